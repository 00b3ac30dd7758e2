"""Modules whose steps do what users do with values: select by masks, check, print, measure, and prepare in hooks."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as L
import torch
import torchmetrics
import torchmetrics.functional as metrics
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- as users import it

WIDTH = 16


class Plain(L.LightningModule):
    """Blocks of a linear and a tanh, and a head; the loss is `loss_of(head's output, batch)`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        return F.mse_loss(out, batch["y"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss_of(self(batch["x"]), batch)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


# ---- masks and lengths of the batch


class Masked(Plain):
    """Rows selected by a mask; the weight of the loss does not depend on their number."""

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        mask = batch["x"][:, 0] > 0
        return (out[mask] - batch["y"][mask]).square().sum() / out.numel()


class Selected(Plain):
    """Rows and elements by `nonzero`, `masked_select`, `where` and `repeat_interleave`."""

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        mask = batch["x"][:, 0] > 0
        chosen = out[mask.nonzero().squeeze(1)].square().sum() + out.masked_select(mask[:, None]).sum()
        repeated = out.repeat_interleave(batch["length"], 0).square().sum() + out[torch.where(~mask)].sum()
        return (chosen + repeated) / out.numel()


class Assigned(Plain):
    """Rows overwritten by a mask, before the last block."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, 0] > 0
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 2:
                x = x.clone()
                x[mask] = 0.5
                x[~mask, 0] = x[~mask, 1] * 2
        return self.head(x)


class Packed(Plain):
    """A recurrent module on packed sequences, and a loop over the lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        steps = out[:, None, :] * torch.ones(1, 4, 1)
        packed = nn.utils.rnn.pack_padded_sequence(steps, batch["length"].cpu(), batch_first=True, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=4)
        total = padded.square().mean()
        for i in range(int(batch["length"].max())):
            total = total + padded[:, i].square().sum() / padded.numel()
        return total


class Filled(Plain):
    """A tensor of zeros that is filled with the results of blocks."""

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.zeros(len(x), WIDTH)
        for block in self.blocks:
            x = block(x)
        seen += x
        out = torch.zeros(len(x), 4)
        out[:] = self.head(seen)
        return out


# ---- values that are only looked at


class Checked(Plain):
    """Asserts, warnings, prints and lists of numbers between blocks and after them."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            assert not torch.isnan(x).any()
            assert torch.isfinite(x).all()
            assert x.abs().max() <= 1, "tanh"
            if x.norm() > 1e6:
                warnings.warn("it diverges", stacklevel=1)
            self.log("mean", float(x.detach().mean()), on_epoch=True, on_step=False)
        return self.head(x)

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        loss = super().loss_of(out, batch)
        if torch.isnan(loss) or loss.item() > 1e9:
            raise ValueError("the loss is not finite")
        assert f"{loss:.3f}" == f"{loss.item():.3f}"
        torch.testing.assert_close(out, out.clone())
        return loss


class Distributed(Plain):
    """Distributions that check their arguments."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        x = torch.distributions.Normal(x, F.softplus(x)).mean
        for block in self.blocks[2:]:
            x = block(x)
        return self.head(x)

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        kind = torch.distributions.Categorical(logits=out)
        return torch.distributions.Normal(out, 1.0).log_prob(batch["y"]).neg().mean() - kind.entropy().mean() * 0.1


class Measured(Plain):
    """Functions of torchmetrics in the step, and numbers made from their results."""

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        with torch.inference_mode():
            accuracy = metrics.accuracy(out.softmax(1), batch["label"], task="multiclass", num_classes=4)
            found = float(len(torch.unique(out.argmax(1))))
        self.log("accuracy", accuracy, on_epoch=True, on_step=False)
        self.log("classes", found, on_epoch=True, on_step=False)
        assert 0 <= round(accuracy.item() * 100) <= 100
        return F.cross_entropy(out, batch["label"])


class CheckedBlock(nn.Module):
    """Asserts on its argument and on its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.isnan(x).any()
        assert x.abs().sum() > 0.1, "random values are small, but not that small"
        assert torch.isfinite(self.up.weight).all()
        return x + self.down(torch.tanh(self.up(x)))


class CheckedInside(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CheckedBlock() for _ in range(4))


class Scaled(Plain):
    """A value that decides: what comes after it is scaled by a Python number."""

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 0:
                x = x / max(1.0, x.norm().item())
        return self.head(x)


class ScaledAlways(Plain):
    """A value of the first linear that decides what every later module computes."""

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.blocks[0]
        scale = max(1.0, (x @ first[0].weight).norm().item())
        for block in self.blocks:
            x = block(x) / scale
        return self.head(x)


class Unpadded(Plain):
    """Rows selected by a mask before the first block, and put back after the last."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, 0] > 0
        return torch.zeros(len(x), 4).masked_scatter(mask[:, None], super().forward(x[mask]))


class Chosen(Plain):
    """A head for each class of rows, of which a batch has perhaps one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        for block in self.blocks:
            x = block(x)
        out = x.new_zeros(len(x), 4)
        for i, head in enumerate(self.heads):
            if (chosen == i).any():
                out = out.index_put((chosen == i,), head(x[chosen == i]))
        return out


# ---- what exists before the first batch


class Prepared(Plain):
    """Lists that hooks make, and the trainer's numbers, loaders, optimizers and schedulers in the step."""

    losses: list[Any]
    factor: float

    def on_fit_start(self) -> None:
        self.factor = 2.0

    def on_train_epoch_start(self) -> None:
        self.losses = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        loss = (
            super().loss_of(out, batch)
            * self.factor
            * (1 + self.trainer.global_step / self.trainer.num_training_batches)
        )
        loss = loss * (1 + self.current_epoch) * self.rate / len(self.trainer.train_dataloader)  # type: ignore[arg-type]
        self.log("lr", self.lr_schedulers().get_last_lr()[0], on_epoch=True, on_step=False)  # type: ignore[union-attr]
        return loss / self.trainer.optimizers[0].param_groups[0]["lr"]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


# ---- weights


class Token(Plain):
    """A class token and positions, whose gradients are those of one sum; also for batches of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.ones(1, 1, WIDTH) * 0.1)
        self.bias = nn.Parameter(torch.zeros(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.token.expand(len(x), -1, -1) + self.position + x[:, None] + self.bias.view(1, 1, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.squeeze(1))


class Gate(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared, self.up, self.down = shared, nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.shared(x))))


class TwoParents(Plain):
    """A module that two blocks have as a child, and call."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Gate(shared) for _ in range(2))


class SharedParts(Plain):
    """Modules of a list, which blocks of another list have as children, and call (as in TabNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(Gate(self.shared[i % 2]) for i in range(4))


class MetricLoss(Plain):
    """A metric that synchronizes in each step, and whose value is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError(dist_sync_on_step=True)

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        return self.error(out.flatten(), batch["y"].flatten())


class Broken(Plain):
    """Fails in the step, whatever values there are."""

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        return batch["missing"]


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(4)


class Vmapped(Plain):
    """A block that `torch.func.vmap` calls for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.func.vmap(self.blocks[0])(x)
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(x)


class Functional(Plain):
    """A block with other weights than its own, by `torch.func.functional_call`."""

    def forward(self, x: Tensor) -> Tensor:
        halved = {name: weight * 0.5 for name, weight in self.blocks[0].named_parameters()}
        x = torch.func.functional_call(self.blocks[0], halved, (x,))
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(x)


class Retained(Plain):
    """A metric that synchronizes in each step, and is logged only."""

    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError(dist_sync_on_step=True)

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        self.error(out.detach().flatten(), batch["y"].flatten())
        self.log("error", self.error, on_epoch=True, on_step=False)
        return super().loss_of(out, batch)
