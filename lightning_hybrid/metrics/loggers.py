"""Passes the plan to loggers, and lets loggers watch a partitioned module."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_hybrid._lightning_private import twins, watch_parts
from lightning_hybrid.collectives import to_local
from lightning_hybrid.ghosts.ghost import Ghost

KEY = "lightning_hybrid"
"""Key of the plan among the hyperparameters."""


def log_plan(trainer: pl.Trainer, record: dict[str, Any]) -> None:
    """Logs the plan, `record`, to all loggers, unless hyperparameters are not logged (`enable_autolog_hparams`)."""
    if not trainer.enable_autolog_hparams:
        return
    for logger in trainer.loggers:
        if isinstance(logger, twins(TensorBoardLogger)):
            logger.log_hyperparams({KEY: record}, metrics={})  # without `metrics`: a second `hp_metric`
        else:
            logger.log_hyperparams({KEY: record})


def _own_part(tensor: Any) -> Any:
    """Returns this rank's part of a weight; None for a weight of another stage."""
    return None if isinstance(tensor, Ghost) else to_local(tensor)


def watched_parts(trainer: pl.Trainer) -> AbstractContextManager:
    """Makes `watch` of W&B show rank 0's shard of each weight: gathering whole weights would wait for other ranks."""
    stack = ExitStack()
    for logger in trainer.loggers:
        if isinstance(logger, twins(WandbLogger)) and trainer.is_global_zero:
            stack.enter_context(watch_parts(logger.experiment, _own_part))
    return stack
