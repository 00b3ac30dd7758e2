"""Modules whose steps change state, and calls that train them; the calls run on every rank of a group."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.jobs import quiet, verified_trainer_for, weights

WIDTH = 8


class Plain(L.LightningModule):
    """A stack of blocks; `report` is what the test compares on every rank."""

    blocks: Any
    queue: torch.Tensor
    center: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)
        self.build()

    def build(self) -> None:
        """Adds state."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, batch: Any) -> torch.Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def report(self) -> Any:
        return None


class Counter(Plain):
    """A number."""

    seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        out = self(batch[0])
        return F.mse_loss(out, batch[1]) + min(1, self.seen / 10) * out.square().mean()

    def report(self):
        return self.seen


class Kept(Plain):
    """Lists that hooks at the end of an epoch read."""

    def build(self):
        self.kept: list[torch.Tensor] = []
        self.outputs: dict[str, list[torch.Tensor]] = {"val": []}
        self.means: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.kept.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.outputs["val"].append(self(batch[0]))

    def on_train_epoch_end(self):
        self.means.append(float(torch.stack(self.kept).mean()))
        self.kept.clear()

    def on_validation_epoch_end(self):
        self.means.append(float(torch.cat(self.outputs["val"]).square().mean()))
        self.outputs["val"].clear()

    def report(self):
        return self.means


class Queue(Plain):
    """A queue of old outputs that the loss uses, as MoCo has, and a center, as DINO."""

    def build(self):
        self.register_buffer("queue", torch.zeros(12, 4))
        self.register_buffer("center", torch.zeros(4))
        self.place = 0

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.mse_loss(out - self.center, batch[1]) + 0.1 * (out @ self.queue.clone().T).square().mean()
        with torch.no_grad():
            self.queue[self.place : self.place + 4] = out[:4]
            self.place = (self.place + 4) % 12
            self.center = 0.9 * self.center + 0.1 * out.mean(0)
        return loss

    def report(self):
        return [self.queue.tolist(), self.center.tolist(), self.place]


class Hidden(Plain):
    """What the first block has computed is carried to the next batch, and other values in nested objects."""

    def build(self):
        self.hidden: torch.Tensor | None = None
        self.history = SimpleNamespace(recent=deque(maxlen=3), total={"loss": 0.0, "steps": [0]})

    def training_step(self, batch, batch_idx):
        x = self.blocks[0](batch[0])
        if self.hidden is not None:
            x = x + 0.5 * self.hidden
        self.hidden = x.detach()
        for block in list(self.blocks)[1:]:
            x = block(x)
        loss = F.mse_loss(self.head(x), batch[1])
        self.history.recent.append(float(loss.detach()))
        self.history.total["loss"] += float(loss.detach())
        self.history.total["steps"][0] += 1
        return loss

    def report(self):
        assert self.hidden is not None
        total = self.history.total
        return [self.hidden.tolist(), list(self.history.recent), total["loss"], total["steps"]]


class Codes(nn.Module):
    """A codebook that follows its input by hand, and counts its calls."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.calls = 0

    def forward(self, x):
        if self.training:
            self.calls += 1
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.mean


class InBlocks(Plain):
    """State inside of units: running means, spectral norm, counters."""

    def build(self):
        for i, block in enumerate(self.blocks):
            norm = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
            self.blocks[i] = nn.Sequential(nn.Sequential(*block, Codes(), norm))

    def report(self):
        codes = [m for m in self.modules() if isinstance(m, Codes)]
        vectors = [b.tolist() for n, b in self.named_buffers() if n.endswith("_u")]
        return [[c.mean.tolist() for c in codes], [c.calls for c in codes], vectors]


class Drawn(Plain):
    """Random generators of the module."""

    def build(self):
        self.coin = random.Random(3)
        self.noise = torch.Generator().manual_seed(5)

    def training_step(self, batch, batch_idx):
        x = batch[0] + 0.1 * torch.randn(batch[0].shape, generator=self.noise)
        loss = F.mse_loss(self(x), batch[1])
        return loss * (2 if self.coin.random() < 0.5 else 1)

    def report(self):
        return [self.coin.random(), torch.rand(2, generator=self.noise).tolist()]


class Updated(Plain):
    """A bank that a module fills where it trains, which it sees by its input or by the mode of gradients."""

    bank: Any

    def build(self):
        self.bank = Bank()

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        return F.mse_loss(out, batch[1]) + (self.bank(out) @ out.T).square().mean()

    def report(self):
        return [self.bank.rows.tolist(), int(self.bank.trained)]


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.ones(4, 4))
        self.register_buffer("trained", torch.zeros(()))

    def forward(self, out: torch.Tensor) -> torch.Tensor:
        rows: Any = self.rows
        known = rows.clone()
        if out.requires_grad:
            with torch.no_grad():
                rows.copy_(out[:4])
        if torch.is_grad_enabled():
            self.trained += 1
        return known


MODULES: dict[str, type[Plain]] = {
    kind.__name__: kind for kind in (Counter, Kept, Queue, Hidden, InBlocks, Drawn, Updated)
}


def data(replicas: int) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, WIDTH, generator=generator), torch.randn(24, 4, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8 // replicas)


def fit(layout: str | None, kind: str, **options: Any) -> dict[str, Any]:
    """Trains and validates; the weights, and the module's report."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = MODULES[kind]()
    trainer, replicas = verified_trainer_for(layout, strategy_options=options, max_epochs=2)
    trainer.fit(module, data(replicas), data(replicas))
    return {"weights": weights(trainer, module), "report": module.report()}


class TwoViews(Plain):
    """A BatchNorm that is called twice in a step."""

    def build(self):
        self.blocks = nn.ModuleList(nn.Sequential(nn.Sequential(*b, nn.BatchNorm1d(WIDTH))) for b in self.blocks)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]) + self(batch[0].flip(1)), batch[1])

    def report(self):
        return [b.tolist() for n, b in self.named_buffers() if "running" in n]


class Later(Plain):
    """A list that begins to grow in the second epoch."""

    def build(self):
        self.kept: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.current_epoch:
            self.kept.append(loss.detach())
        return loss


class Center(Plain):
    """A center that follows the outputs, of the replica's samples."""

    def build(self):
        self.register_buffer("center", torch.zeros(4))
        self.register_buffer("last", torch.zeros(0), persistent=False)  # not kept, so each replica may have its own

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        self.last = out.detach()
        loss = F.mse_loss(out - self.center, batch[1])
        self.center = 0.9 * self.center + 0.1 * self.mean(out.detach())
        return loss

    def mean(self, out: torch.Tensor) -> torch.Tensor:
        return out.mean(0)

    def report(self):
        return self.center.tolist()


class GatheredCenter(Center):
    """A center that follows the outputs of all replicas."""

    def mean(self, out):
        gathered = self.all_gather(out)
        assert isinstance(gathered, torch.Tensor)
        return gathered.reshape(-1, 4).mean(0)


MODULES |= {"TwoViews": TwoViews, "Later": Later, "Center": Center, "GatheredCenter": GatheredCenter}
REFUSED = ("Later",)
