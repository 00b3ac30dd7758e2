"""Private parts of Lightning's `WandbLogger`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_hybrid._lightning_private.packages import twins
from lightning_hybrid.patching import patched

_KEPT = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only", "_every_n_train_steps")
"""Attributes of a `ModelCheckpoint` that Lightning puts into the metadata of an artifact."""


def wandb_loggers(trainer: pl.Trainer) -> list[Any]:
    """Returns the trainer's loggers for Weights & Biases."""
    return [logger for logger in trainer.loggers if isinstance(logger, twins(WandbLogger))]


def run_id(logger: Any) -> str | None:
    """Returns the id of the logger's run, or the id that its run will have; None if W&B will choose one."""
    return logger.version


def set_run_id(logger: Any, found: str) -> None:
    """Makes a logger whose run has not begun continue the run `found`."""
    logger._id = logger._wandb_init["id"] = found


@contextmanager
def checkpoints_passed(logger: Any, saved: Callable[[Any], None], failed: Callable[[], bool]) -> Iterator[None]:
    """Replaces what a logger does with saved checkpoints, of which it takes files only.

    Args:
        logger: The logger.
        saved: Called with a `ModelCheckpoint` whose checkpoints are to be uploaded: with `log_model="all"` after each
            save, and always at the end of the context.
        failed: Returns True if the run has failed; then nothing is uploaded at the end, as in Lightning.
    """
    seen: dict[int, Any] = {}

    def after_save(callback: Any) -> None:
        seen[id(callback)] = callback
        saved(callback)

    with patched(logger, _scan_and_log_checkpoints=after_save):
        yield
    if not failed():
        for callback in (seen | logger._checkpoint_callbacks).values():
            saved(callback)


def logged_times(logger: Any) -> dict[str, float]:
    """Returns the time at which each checkpoint that the logger has uploaded was written, by path."""
    return logger._logged_model_time


def artifact_name(logger: Any) -> str:
    """Returns the name of the artifacts of a logger, as Lightning chooses it."""
    if not logger._checkpoint_name:
        logger._checkpoint_name = f"model-{logger.experiment.id}"
    return logger._checkpoint_name


def saved_scores(callback: Any) -> dict[str, Any]:
    """Returns the paths that a `ModelCheckpoint` has saved and still keeps, each with its score or None."""
    found = {callback.last_model_path: callback.current_score, callback.best_model_path: callback.best_model_score}
    found |= callback.best_k_models
    return {path: s.item() if isinstance(s, Tensor) else s for path, s in found.items() if path}


def options_of(callback: Any) -> dict[str, Any]:
    """Returns the options of a `ModelCheckpoint`, as Lightning puts them into the metadata of an artifact."""
    return {type(callback).__name__: {k: getattr(callback, k) for k in _KEPT if hasattr(callback, k)}}
