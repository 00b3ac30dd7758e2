"""Private parts of Lightning's own callbacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.optim import Optimizer

from lightning_hybrid._lightning_private.packages import twins

_LIBRARIES = ("lightning.", "pytorch_lightning.", "lightning_hybrid.")


def users_callbacks(trainer: pl.Trainer) -> list[Any]:
    """Returns the callbacks of the trainer whose classes belong neither to Lightning nor to this package."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    return [callback for callback in callbacks if not type(callback).__module__.startswith(_LIBRARIES)]


def average_of(callback: Any) -> Any:
    """Returns the average that a callback keeps."""
    return callback._average_model


def set_average(callback: Any, average: Any) -> None:
    """Replaces the average that a callback keeps."""
    callback._average_model = average


def average_options(callback: WeightAveraging) -> dict[str, Any]:
    """Returns the arguments with which a callback has made its `AveragedModel`."""
    return callback._kwargs


def averaged_once_per_epoch(trainer: pl.Trainer) -> list[Any]:
    """Returns the callbacks that average weights over epochs."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    return [c for c in callbacks if isinstance(c, twins(StochasticWeightAveraging))]


def averaged_per_step(trainer: pl.Trainer) -> list[Any]:
    """Returns the callbacks that keep an `AveragedModel`, which they have during training."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    return [c for c in callbacks if isinstance(c, twins(WeightAveraging)) and c._average_model is not None]


def forget_schedulers_before_averaging(callback: Any, trainer: pl.Trainer) -> None:
    """Removes schedulers of a run that resumes within the averaged epochs: the saved one is that of the averaging."""
    if callback._scheduler_state is not None:
        callback._clear_schedulers(trainer)


@contextmanager
def parameters_compared_by_identity() -> Iterator[None]:
    """Makes `BaseFinetuning` compare parameters of optimizers by identity instead of by value."""

    def padding(optimizer: Optimizer, params: Iterable[Any]) -> list[Any]:
        present = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [p for p in params if id(p) not in present]

    originals = {kind: kind.__dict__["filter_on_optimizer"] for kind in twins(BaseFinetuning)}
    for kind in originals:
        kind.filter_on_optimizer = staticmethod(padding)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.filter_on_optimizer = original
