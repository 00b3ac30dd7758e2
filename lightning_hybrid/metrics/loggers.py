"""Loggers: the plan in the configuration that they keep of a run; what they may look at of a partitioned module."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_hybrid._lightning_private import watch_parts
from lightning_hybrid.collectives import to_local

KEY = "lightning_hybrid"
"""Under which the plan stands among the hyperparameters."""


def log_plan(trainer: pl.Trainer, record: dict[str, Any]) -> None:
    """Gives the plan to all loggers, unless hyperparameters are not to be logged (`enable_autolog_hparams`)."""
    if not trainer.enable_autolog_hparams:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams({KEY: record}, metrics={})  # without it, a second value of its `hp_metric`
        else:
            logger.log_hyperparams({KEY: record})


def log_sent_bytes(trainer: pl.Trainer, sent: float) -> None:
    """Tells all loggers what a rank sends for the gradients of each step from now on."""
    for logger in trainer.loggers:
        logger.log_metrics({"gradient_sync/sent_mib_per_step": sent / 2**20}, step=trainer.global_step)


def watched_parts(trainer: pl.Trainer) -> AbstractContextManager:
    """`watch` of W&B shows the part of each weight that rank 0 holds: to see the whole it would wait for the others."""
    stack = ExitStack()
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            stack.enter_context(watch_parts(logger.experiment, to_local))
    return stack
