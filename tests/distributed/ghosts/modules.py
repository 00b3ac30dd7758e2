"""Modules with what users do with weights: expanded ones, modules with two parents, `torch.func`, lazy modules."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
import torchmetrics
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


class MetricLoss(Plain):
    """A metric that synchronizes in each step, and whose value is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError(dist_sync_on_step=True)

    def loss_of(self, out: Tensor, batch: Any) -> Tensor:
        return self.error(out.flatten(), batch["y"].flatten())


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
