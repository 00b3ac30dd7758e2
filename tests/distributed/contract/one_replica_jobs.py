"""Hooks that do on one replica only what replicas do together; the calls run on every rank of a group."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for


class LogsOnRankZero(Classifier):
    def on_train_epoch_end(self):
        if self.trainer.is_global_zero:
            self.log("epoch", 1.0)


class LogsBySample(Classifier):
    """As `if loss > bound: self.log(...)` does."""

    def on_train_batch_end(self, outputs: Any, batch, batch_idx):
        if (batch["index"] == 17).any():
            self.log("found", 1.0)


class LogsAtTheEnd(Classifier):
    """In the last epoch."""

    def on_train_epoch_end(self):
        if self.current_epoch == 1 and self.global_rank == 1:
            self.log("last", 1.0)


class Computes(Classifier):
    def on_validation_epoch_end(self):
        if self.trainer.is_global_zero:
            self.mean.compute()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.mean.update(batch["x"].mean())

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()


class Saves(Classifier):
    """Without Lightning's callback."""

    def on_train_epoch_end(self):
        if self.trainer.is_global_zero:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "own.ckpt")


class Reads(Classifier):
    """Shows the first validation batch."""

    def on_train_epoch_end(self):
        if self.trainer.is_global_zero:
            loaders: Any = self.trainer.val_dataloaders
            self.seen.append(float(next(iter(loaders))["x"].sum()))


MODULES: dict[str, tuple[type[Classifier], str]] = {
    kind.__name__: (kind, what)
    for kind, what in (
        (LogsOnRankZero, r"logs `epoch` in `on_train_epoch_end` \(.*jobs.py:\d+ \(on_train_epoch_end\)"),
        (LogsBySample, "logs `found` in `on_train_batch_end`"),
        (LogsAtTheEnd, "logs `last` in `on_train_epoch_end`"),
        (Computes, "computes the value of `mean`"),
        (Saves, "saves a checkpoint"),
        (Reads, "begins to read a loader"),
    )
}


def fit(layout: str, kind: str, folder: str) -> None:
    """Trains and validates for two epochs."""
    quiet()
    L.seed_everything(7, verbose=False)
    options = {"timeout": timedelta(seconds=40)}
    trainer, replicas = trainer_for(layout, strategy_options=options, max_epochs=2, default_root_dir=folder)
    loader = DataLoader(Numbers(), batch_size=16 // replicas)
    trainer.fit(MODULES[kind][0](), loader, loader)


class Rate(Classifier):
    """Sets the learning rate in hooks.

    Args:
        alike: Whether all replicas set the same one.
    """

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.alike = alike

    def on_train_batch_end(self, outputs: Any, batch, batch_idx):
        loss: Any = outputs["loss"].detach()
        if self.alike:
            gathered: Any = self.all_gather(loss)
            loss = gathered.mean()
        optimizer: Any = self.optimizers()
        optimizer.param_groups[0]["lr"] = 0.1 * float(loss)


def train_by_rate(layout: str | None, alike: bool) -> dict[str, torch.Tensor]:
    """Trains; the weights."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Rate(alike)
    trainer, replicas = trainer_for(layout, max_epochs=2)
    trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    strategy: Any = trainer.strategy
    state = module.state_dict() if layout is None else strategy.full_state_dict()
    return {name: value.clone() for name, value in state.items()}
