"""Runs whose checkpoints a `WandbLogger` uploads; all offline."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from lightning_hybrid import CheckpointOptions, HybridStrategy
from tests.distributed.contract.jobs import make_trainer, start
from tests.distributed.jobs import Classifier, Numbers

KEY = "0123456789abcdef0123456789abcdef01234567"
"""Of the form of W&B's keys."""


@contextmanager
def offline() -> Iterator[None]:
    """W&B without network; its service process is ended afterwards."""
    with patch.dict(os.environ, {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "WANDB_SILENT": "true"}):
        try:
            yield
        finally:
            wandb.finish()
            wandb.teardown()


def fit(
    layout: str,
    folder: Path,
    steps: int,
    log_model: Any = True,
    last: bool = False,
    options: dict[str, Any] | None = None,
    saves: dict[str, Any] | None = None,
) -> str | None:
    """Trains, and saves every second step; returns the id of the run on rank 0."""
    start()
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    logger = WandbLogger(save_dir=folder, project="test", log_model=log_model)
    checkpoint = ModelCheckpoint(folder / "saved", every_n_train_steps=2, **(saves or {}))
    more = {"logger": logger, "callbacks": [checkpoint], "enable_checkpointing": True, "max_epochs": -1}
    strategy: Any = HybridStrategy(layout, verify="off", checkpoints=CheckpointOptions(**(options or {})))
    trainer, replicas = make_trainer(layout, **{**more, "strategy": strategy, "max_steps": steps})
    with offline():
        trainer.fit(Classifier(), DataLoader(Numbers(), batch_size=16 // replicas), ckpt_path="last" if last else None)
        return logger.version
