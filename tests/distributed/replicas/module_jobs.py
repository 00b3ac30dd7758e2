"""Modules whose replicas do different things, and what users do with weights; `fit` runs on every rank."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.jobs import quiet, verified_trainer_for, weights

WIDTH, CLASSES, SAMPLES, BATCH = 16, 4, 16, 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Net(L.LightningModule):
    """A stack of blocks and a head; the first feature of a sample is 1 on replica 0 and -1 on replica 1."""

    rate, validates, epochs = 0.2, False, 3

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.losses: list[float] = []

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.logged(functional.mse_loss(self(batch[0]), batch[1]))

    def logged(self, loss: Tensor) -> Tensor:
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self) -> Any:
        # with weight decay, a gradient of zeros is not the same as none
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1, eps=1e-4)


class Heads(Net):
    """A head per task, each a block; no replica's batch has both tasks, and no batch has the third."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        h, loss = self.body(x), torch.zeros(())
        for task, sign in enumerate((1.0, -1.0)):
            mask = (x[:, :1] == sign).float()
            if float(mask.sum()) > 0:
                loss = loss + (mask * (self.heads[task](h) - y)).square().sum() / y.numel()
        return self.logged(loss)


class NormedHeads(Heads):
    """With batch statistics, whose collectives must not meet those of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(Layer(), nn.BatchNorm1d(WIDTH)) for _ in range(3))

    def body(self, x: Tensor) -> Tensor:
        return self.norm(super().body(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ManualHeads(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Masked(Net):
    """A head that is called only where a mask has a sample, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.never = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        h, mask = self.body(x), x[:, 0] > 0
        loss = functional.mse_loss(self.head(h), y)
        if mask.any():
            loss = loss + (self.extra(h[mask]) - y[mask]).square().sum() / len(x)
        return self.logged(loss)


class Router(nn.Module):
    """A block with parts that get no sample on a replica."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, out = x[:, :1], torch.zeros_like(x)
        for part, sign in zip(self.parts, (1.0, -1.0), strict=False):
            mask = first[:, 0] == sign
            if mask.any():
                out[mask] = part(x[mask])
        return torch.cat([first, out[:, 1:]], dim=1)


class Routed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Router() for _ in range(3))


class DeadEnd(Heads):
    """All replicas call a head whose result one of them does not use."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        h, mask = self.body(x), (x[:, 0] > 0)
        loss, other = functional.mse_loss(self.heads[0](h), y), self.heads[1](h)
        if mask.any():
            loss = loss + other[mask].square().sum() / len(x)
        return self.logged(loss)


class ScalarOfOne(Net):
    """A scalar, which is never sharded, is used on one replica."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out, mask = self(x), x[:, 0] > 0
        loss = functional.mse_loss(out, y)
        if mask.any():
            loss = loss + (self.scale * out[mask]).square().sum() / len(x)
        return self.logged(loss)


class Penalty(Net):
    """The loss has the norm of all weights, and that of a block's."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        penalty = sum(p.square().sum() for p in self.parameters()) + next(self.blocks[1].parameters()).abs().sum()
        return super().training_step(batch, batch_idx) + 0.1 * penalty


class Teacher(Net):
    """A teacher that follows in the step, and a parameter computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.blocks).requires_grad_(False)
        self.offset = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            for own, followed in zip(self.teacher.parameters(), self.blocks.parameters(), strict=True):
                own.data.lerp_(followed.data, 0.5)
            self.offset.copy_(self.head.weight.mean(0))
        h, target = self.body(batch[0]), batch[0]
        for block in self.teacher:
            target = block(target)
        loss = functional.mse_loss(self.head(h + self.offset), batch[1])
        return self.logged(loss + (h - target).square().mean())


class Prototype(Teacher):
    """Writes a parameter with a value that depends on the samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        h = self.body(batch[0])
        self.offset.data.lerp_(h.detach().mean(0), 0.1)
        return self.logged(functional.mse_loss(self.head(h + self.offset), batch[1]))


class WithInit(Net):
    """The optimizer and its scheduler are made with the module."""

    def __init__(self) -> None:
        super().__init__()
        groups: list[Any] = [{"params": [*self.blocks.parameters()], "lr": 0.02}, {"params": [*self.head.parameters()]}]
        self.made = torch.optim.AdamW(groups, lr=0.01, eps=1e-4)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.made, 1, 0.5)

    def configure_optimizers(self) -> Any:
        return [self.made], [self.schedule]


class Unregistered(Net):
    """The optimizer has a tensor that is no parameter of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.zeros(WIDTH, requires_grad=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), self.shift], lr=0.1)


class Contrastive(Net):
    """A loss over the samples of all replicas, with labels by rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        own, key = (functional.normalize(f(batch[0]), dim=1) for f in (self, self.head))
        keys: Any = self.all_gather(key, sync_grads=True)
        if self.trainer.world_size > 1:
            keys = keys.flatten(0, 1)
        labels = torch.arange(len(own)) + self.global_rank * len(own)
        return self.logged(functional.cross_entropy(3 * own @ keys.T, labels))


class Clipped(Net):
    """Clips by torch's functions, in a hook of Lightning and in one of its own."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        norm = nn.utils.clip_grad_norm_(self.blocks.parameters(), 0.05, norm_type=3.0)
        largest = nn.utils.clip_grad_norm_(self.parameters(), 0.03, norm_type=float("inf"))
        nn.utils.clip_grad_value_(self.head.parameters(), 0.02)
        self.losses += [float(norm), float(largest)]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


class Activated(nn.BatchNorm1d):
    """Does more than it inherits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(1.5 * x).relu() + 0.1


class ByFunction(nn.Module):
    """Normalizes by torch's function."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.mean, self.var, training=self.training)


class ByInstance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(-1, 4, WIDTH // 4)).flatten(1)


class Norms(Net):
    """Every kind of normalization."""

    validates = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def __init__(self) -> None:
        super().__init__()
        batch = (
            nn.SyncBatchNorm(WIDTH),
            nn.BatchNorm1d(WIDTH, track_running_stats=False),
            nn.BatchNorm1d(WIDTH, momentum=None),
        )
        norms = Activated(WIDTH), ByFunction(), ByInstance(), *batch, nn.GroupNorm(4, WIDTH)
        self.stack = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), norm) for norm in norms)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack:
            x = layer(x)
        return self.head(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", functional.mse_loss(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["validation"]))


class Later(Net):
    """From a step on, another block is called: by all replicas, or by one."""

    def forward(self, x: Tensor, own: bool = True) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i != 2 or self.trainer.global_step < 3 or not own:
                x = block(x)
        return self.head(x)


class LaterOnOne(Later):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        own = bool(batch[0][0, 0] > 0)
        return self.logged(functional.mse_loss(self(batch[0], own), batch[1]))


class NoLossOfOne(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if self.trainer.global_step == 2 and bool(batch[0][0, 0] > 0) else loss


class NoLoss(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class Stops(L.Callback):
    """Stops in a hook of the last rank."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == trainer.world_size - 1 and trainer.global_step == 3:
            trainer.should_stop = True


class StopsInStep(Net):
    validates, epochs = True, 5

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.is_global_zero and self.trainer.global_step == 2:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", functional.mse_loss(self(batch[0]), batch[1]))


class StopsUnseen(Net):
    """No code names the attribute that it sets."""

    epochs = 5

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.is_global_zero and self.trainer.global_step == 3:
            setattr(self.trainer, "_".join(("should", "stop")), True)

    def on_train_epoch_end(self) -> None:
        """Logs nothing."""


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, WIDTH, generator=generator), torch.randn(SAMPLES, CLASSES, generator=generator)
    x[0::2, 0], x[1::2, 0] = 1.0, -1.0
    return TensorDataset(x, y)


def fit(name: str, layout: str | None, **options: Any) -> dict[str, Any]:
    """Trains the module `name`; the losses it has seen, its weights, and the number of steps."""
    quiet()
    L.seed_everything(0, verbose=False)
    kind = {k.__name__: k for k in (Net, *_subclasses(Net))}[name]
    module = kind()
    callbacks: Any = [Stops()] if options.pop("stops", False) else []
    trainer, replicas = verified_trainer_for(layout, max_epochs=kind.epochs, callbacks=callbacks, **options)
    loader = DataLoader(data(), batch_size=BATCH // replicas)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        warnings.filterwarnings("ignore", ".*a trial run of the step without weights has failed")
        trainer.fit(module, loader, loader if kind.validates else None)
    return {"losses": module.losses, "weights": weights(trainer, module), "steps": trainer.global_step}


def _subclasses(kind: type) -> list[Any]:
    return [s for k in kind.__subclasses__() for s in (k, *_subclasses(k))]
