"""Modules whose code changes variables outside of them; the calls run on every rank of a group."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch

from tests.distributed.engine.state_jobs import Plain, data
from tests.distributed.jobs import quiet, verified_trainer_for, weights

LOSSES: list[Any] = []
STEPS = 0
BY_HOOK: dict[str, int] = {}


class Settings:
    steps = 0


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
    module = Global() if kind == "Global" else enclosed(LOSSES)
    trainer, replicas = verified_trainer_for(layout, max_epochs=2)
    trainer.fit(module, data(replicas))
    return {
        "weights": weights(trainer, module),
        "losses": [type(loss).__name__ for loss in LOSSES],
        "counts": (STEPS, Settings.steps, dict(BY_HOOK)),
    }
