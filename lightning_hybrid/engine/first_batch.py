"""Arguments of steps outside Lightning's loops: of a first step for planning, and of an additional prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_hybrid._lightning_private import loop_loaders, on_before_batch_transfer, running_prediction
from lightning_hybrid.batches import tiled_batch
from lightning_hybrid.dataloader.peek import Share, sample_batch, size_of_batches
from lightning_hybrid.rng.state import preserved_rng

Sample = Callable[[Share | None], tuple[str, tuple, int | None]]
"""Function that returns the name of a step, the step's arguments on the device, the batch first, and the number of
samples that were read for the batch if it is known.

Its argument is the replica whose batch is wanted; None: the first batch of one process.
"""

_STEPS: dict[Any, str] = {
    TrainerFn.FITTING: "training_step",
    TrainerFn.VALIDATING: "validation_step",
    TrainerFn.TESTING: "test_step",
    TrainerFn.PREDICTING: "predict_step",
}


def first_step(trainer: pl.Trainer, share: Share | None) -> tuple[str, tuple, int | None]:
    """Returns the trainer's first step with a first batch on the device (see `Sample`)."""
    name = _STEPS[trainer.state.fn]
    with preserved_rng():
        loaders = loop_loaders(trainer)
    batch, extra = sample_batch(loaders, training=name == "training_step", share=share)
    return name, step_arguments(trainer, name, batch, 0, extra), size_of_batches(loaders)


def training_step_like(
    trainer: pl.Trainer, batch_size: int | None, share: Share | None
) -> tuple[str, tuple, int | None]:
    """Returns `training_step` with a batch of the running training's loaders (see `Sample`).

    Args:
        trainer: The trainer.
        batch_size: Number of samples of the batch; None: that of the loader's batch.
        share: The replica whose batch is wanted; None: the first batch of one process.
    """
    batch, _ = sample_batch(trainer.train_dataloader, training=True, share=share)
    if batch_size is not None:
        batch = tiled_batch(batch, batch_size)
    size = size_of_batches(trainer.train_dataloader) if batch_size is None else batch_size
    return "training_step", step_arguments(trainer, "training_step", batch, 0, ()), size


def prediction_arguments(trainer: pl.Trainer, batch: Any) -> tuple:
    """Returns the arguments of `predict_step` for one more batch of the loader that is being predicted on."""
    loader, loaders, number = running_prediction(trainer)
    return step_arguments(trainer, "predict_step", batch, max(0, number - 1), (loader,) if loaders > 1 else ())


def step_arguments(trainer: pl.Trainer, name: str, batch: Any, number: int, extra: tuple[int, ...]) -> tuple:
    """Returns the arguments with which a loop would call the step `name` for batch `number` of a loader."""
    loader = extra[0] if extra else 0
    batch = trainer.precision_plugin.convert_input(batch)
    batch = on_before_batch_transfer(trainer.lightning_module, batch, loader)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
    step = getattr(trainer.lightning_module, name)
    index = (number,) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()
    return (batch, *index, *extra)
