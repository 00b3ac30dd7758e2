"""Passes the plan and the traffic of gradients to loggers, and lets loggers watch a partitioned module."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_hybrid._lightning_private import watch_parts
from lightning_hybrid.collectives import to_local

KEY = "lightning_hybrid"
"""Key of the plan among the hyperparameters."""


def log_plan(trainer: pl.Trainer, record: dict[str, Any]) -> None:
    """Logs the plan, `record`, to all loggers, unless hyperparameters are not logged (`enable_autolog_hparams`)."""
    if not trainer.enable_autolog_hparams:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams({KEY: record}, metrics={})  # without `metrics`: a second `hp_metric`
        else:
            logger.log_hyperparams({KEY: record})


def log_sent_bytes(trainer: pl.Trainer, sent: float) -> None:
    """Logs `sent`, the bytes that a rank sends for the gradients of each step from now on, to all loggers in MiB."""
    for logger in trainer.loggers:
        logger.log_metrics({"gradient_sync/sent_mib_per_step": sent / 2**20}, step=trainer.global_step)


def watched_parts(trainer: pl.Trainer) -> AbstractContextManager:
    """Makes `watch` of W&B show rank 0's shard of each weight: gathering whole weights would wait for other ranks."""
    stack = ExitStack()
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            stack.enter_context(watch_parts(logger.experiment, to_local))
    return stack
