"""Modules whose code changes variables outside of them; the calls run on every rank of a group."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.engine.state_jobs import WIDTH, Plain, data
from tests.distributed.jobs import quiet, verified_trainer_for, weights

LOSSES: list[Any] = []
STEPS = 0
BY_HOOK: dict[str, int] = {}


GENERATOR = np.random.default_rng(3)
NOISE = torch.Generator()
SEEN: Counter[str] = Counter()


class Settings:
    steps = 0


class Tracker:
    """An average that the step divides by, in an object of the user."""

    def __init__(self) -> None:
        self.calls, self.history = 0, []  # type: ignore[var-annotated] -- as users write it

    def update(self) -> None:
        self.calls += 1
        self.history.append(self.calls)


TRACKER = Tracker()


def _note(loss: torch.Tensor) -> None:
    LOSSES.append(loss.detach())


class Global(Plain):
    """A list of losses, a counter that the loss depends on, an attribute of another class, and a dict of a hook."""

    def training_step(self, batch, batch_idx):
        global STEPS
        STEPS += 1
        Settings.steps += 1
        loss = self.loss(batch) / STEPS
        _note(loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        BY_HOOK["trained"] = sum(p.requires_grad for p in self.parameters())
        BY_HOOK["calls"] = BY_HOOK.get("calls", 0) + 1


class Objects(Plain):
    """An object, a counter, and random generators of NumPy and torch that the loss depends on."""

    def training_step(self, batch, batch_idx):
        TRACKER.update()
        SEEN["steps"] += 1
        factor = 1 + float(GENERATOR.random()) + float(torch.rand((), generator=NOISE))
        return self.loss(batch) * factor / TRACKER.calls / SEEN["steps"]


class Iterators(Plain):
    """A generator, a cycle in a list, and the iterator of another loader."""

    def build(self) -> None:
        self.factors = (0.9**k for k in range(1000))
        self.cycles = [itertools.cycle([1.0, 0.5, 0.25])]
        rows = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(2))
        self.others = iter(DataLoader(TensorDataset(rows), batch_size=2))

    def training_step(self, batch, batch_idx):
        other = self(next(self.others)[0]).square().mean()
        return self.loss(batch) * next(self.factors) * next(self.cycles[0]) + 0.1 * other


def enclosed(losses: list[Any]) -> Plain:
    """A module whose class is defined in a function."""
    steps = 0

    class Enclosed(Plain):
        def training_step(self, batch, batch_idx):
            nonlocal steps
            steps += 1
            loss = self.loss(batch) / steps
            losses.append(loss.detach())
            return loss

    return Enclosed()


def fit(layout: str | None, kind: str) -> dict[str, Any]:
    """Trains; the weights, and what the variables hold then."""
    global STEPS
    quiet()
    L.seed_everything(7, verbose=False)
    LOSSES.clear()
    BY_HOOK.clear()
    STEPS = Settings.steps = 0
    SEEN.clear()
    TRACKER.__init__()  # type: ignore[misc] -- as new
    GENERATOR.bit_generator.state = np.random.default_rng(3).bit_generator.state
    NOISE.manual_seed(5)
    module = (
        {"Global": Global, "Objects": Objects, "Iterators": Iterators}[kind]()
        if kind != "Enclosed"
        else enclosed(LOSSES)
    )
    trainer, replicas = verified_trainer_for(layout, max_epochs=2)
    trainer.fit(module, data(replicas))
    return {
        "weights": weights(trainer, module),
        "losses": [type(loss).__name__ for loss in LOSSES],
        "counts": (STEPS, Settings.steps, dict(BY_HOOK), TRACKER.history, dict(SEEN)),
    }
