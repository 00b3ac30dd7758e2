"""Modules that write their weights in place during the step, and modules that cannot be partitioned at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.distributed.ghosts.modules import WIDTH, Plain


class Scaled(nn.Module):
    """Two linears whose weights the module scales to norm 1 in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.weight.div_(self.up.weight.norm(dim=1, keepdim=True))
        self.down.weight.data /= self.down.weight.norm()
        return x + self.down(torch.tanh(self.up(x)))


class Halved(Scaled):
    """A bias that the module halves in each call."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.down.bias.mul_(0.5)
        return x + self.down(torch.tanh(self.up(x)))


class ScaledBlocks(Plain):
    """Weights that their own module writes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(2))


class HalvedBlocks(Plain):
    """A bias that its own module writes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Halved() for _ in range(2))


class Bounded(Plain):
    """Rows of an embedding that a batch uses are scaled to a norm, so replicas would scale other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, WIDTH, max_norm=0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_of(self(batch["x"] + self.embedding(batch["label"])), batch)


class Sparse(Plain):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, WIDTH, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_of(self(batch["x"] + self.embedding(batch["label"])), batch)


class Scripted(Plain):
    """A block of TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = torch.jit.script(self.blocks[0])


class Empty(Plain):
    """A weight without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.empty(0, WIDTH))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.unused.sum()


class Pruned(Plain):
    """A weight with zeros, which its module computes anew in each call."""

    def __init__(self) -> None:
        super().__init__()
        prune.l1_unstructured(self.get_submodule("blocks.1.0"), "weight", 0.3)
