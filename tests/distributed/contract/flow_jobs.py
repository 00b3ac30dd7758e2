"""Runs with the options of the Trainer that decide what is run when; each returns what a rank has seen."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import nn
from torch.utils.data import DataLoader

from tests.distributed.contract import modules
from tests.distributed.contract.jobs import loader, make_trainer, start
from tests.distributed.jobs import weights

OPTIONS: dict[str, dict[str, Any]] = {
    "limit_train_batches and limit_val_batches": {"limit_train_batches": 2, "limit_val_batches": 1},
    "limit_train_batches as a fraction": {"limit_train_batches": 0.67, "limit_val_batches": 0.5},
    "fast_dev_run": {"fast_dev_run": 2},
    "val_check_interval": {"val_check_interval": 2},
    "val_check_interval as a fraction": {"val_check_interval": 0.34},
    "overfit_batches": {"overfit_batches": 2},
    "detect_anomaly": {"detect_anomaly": True},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "reload_dataloaders_every_n_epochs": {"reload_dataloaders_every_n_epochs": 1},
    "max_steps": {"max_steps": 4, "max_epochs": -1},
    "max_time": {"max_time": timedelta(seconds=0), "max_epochs": -1},
    "no sanity validation": {"num_sanity_val_steps": 0},
    "full sanity validation": {"num_sanity_val_steps": -1},
    "barebones": {"barebones": True},
}


class Data(L.LightningDataModule):
    """Loaders that count how often they were asked for."""

    def __init__(self, replicas: int) -> None:
        super().__init__()
        self.replicas, self.asked = replicas, 0

    def train_dataloader(self) -> DataLoader:
        self.asked += 1
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        return loader(self.replicas, 24 if epoch else 40)

    def val_dataloader(self) -> DataLoader:
        return loader(self.replicas, 32)


class Counted(modules.Base):
    """Counts the calls of its steps and hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.calls.append(f"validation {batch_idx}{' (sanity)' if self.trainer.sanity_checking else ''}")
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("test", nn.functional.cross_entropy(self(batch["x"]), batch["y"]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"index": batch["index"], "logits": self(batch["x"])}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.calls.append(f"training {self.current_epoch} {batch_idx}")


def options(layout: str | None, name: str) -> dict[str, Any]:
    """Trains with one of `OPTIONS`."""
    start()
    memory, module = modules.Memory(), Counted()
    if name == "barebones":
        fixed: dict[str, Any] = {"log_every_n_steps": None, "num_sanity_val_steps": None, "logger": None}
        fixed |= {k: None for k in ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    else:
        fixed = {"logger": memory}
    trainer, n = make_trainer(layout, **{**fixed, **OPTIONS[name]})
    data = Data(n)
    trainer.fit(module, datamodule=data)
    calls = [c for i, c in enumerate(module.calls) if i == 0 or c != module.calls[i - 1]]  # microbatches and dry runs
    return {
        "weights": weights(trainer, module),
        "seen": {"lines": memory.lines, "step": trainer.global_step, "calls": calls},
        "asked": data.asked,
    }


def sequence(layout: str | None) -> dict[str, Any]:
    """fit, validate, test, predict, and a second fit, with one Trainer and one module."""
    start()
    memory, module = modules.Memory(), Counted()
    trainer, n = make_trainer(layout, logger=memory, callbacks=[LearningRateMonitor()], max_epochs=1)
    trainer.fit(module, loader(n), loader(n, 24))
    first: Any = trainer.validate(module, loader(n, 24), verbose=False)
    second: Any = trainer.test(module, loader(n, 32), verbose=False)
    predicted: Any = trainer.predict(module, loader(n, 24))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(n), loader(n, 24))
    third: Any = trainer.validate(module, [loader(n, 24), loader(n, 16)], verbose=False)
    return {
        "weights": weights(trainer, module),
        "seen": {"lines": memory.lines, "returned": [first, second, third]},
        "predicted": {int(i): row for out in predicted for i, row in zip(out["index"], out["logits"], strict=True)},
    }


def as_numbers(predicted: dict[int, torch.Tensor]) -> dict[int, list[float]]:
    """Rows of tensors as lists, by the number of the sample."""
    return {i: row.tolist() for i, row in sorted(predicted.items())}
