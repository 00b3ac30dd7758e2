"""Windows of accumulated batches: when the optimizer makes a step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def begin_window(trainer: pl.Trainer, batches: int) -> None:
    """Accumulates gradients of `batches` batches, counted from the training batch that is about to run.

    Lightning counts from the beginning of an epoch, in two places that disagree when the number changes: a window
    would begin in the middle of another, and steps would use gradients of too few or too many batches.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    progress, optimization = loop.batch_progress, loop.automatic_optimization
    first = progress.current.ready - 1
    trainer.accumulate_grad_batches = batches
    zero_grad = type(optimization)._make_zero_grad_fn
    loop._first_of_window = first
    loop._accumulated_batches_reached = lambda: (progress.current.ready - first) % batches == 0
    optimization._make_zero_grad_fn = lambda batch, optimizer: zero_grad(optimization, batch - first, optimizer)


def end_windows(trainer: pl.Trainer) -> None:
    """Restores Lightning's own count of accumulated batches."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop.__dict__.pop("_first_of_window", None)
    loop.__dict__.pop("_accumulated_batches_reached", None)
    loop.automatic_optimization.__dict__.pop("_make_zero_grad_fn", None)


def batches_left_in_window(trainer: pl.Trainer) -> int:
    """Returns the number of batches up to the optimizer's next step, including the one that is about to run."""
    left = trainer.accumulate_grad_batches - _batches_of_window(trainer)
    return int(min(left, trainer.num_training_batches - trainer.fit_loop.epoch_loop.batch_progress.current.ready + 1))


def begins_window(trainer: pl.Trainer) -> bool:
    """Returns True if the training batch that is about to run is the first one since the optimizer's last step."""
    return _batches_of_window(trainer) == 0


def _batches_of_window(trainer: pl.Trainer) -> int:
    """Returns the number of batches since the optimizer's last step, without the one that is about to run."""
    loop: Any = trainer.fit_loop.epoch_loop
    done = loop.batch_progress.current.ready - 1
    return (done - loop.__dict__.get("_first_of_window", 0)) % trainer.accumulate_grad_batches


def steps_after_batch(trainer: pl.Trainer) -> bool:
    """Returns True if the optimizer makes a step with the training batch that runs, or has just run."""
    return not trainer.fit_loop._should_accumulate()


def between_steps(trainer: pl.Trainer) -> bool:
    """Returns True if no batch has run since the optimizer's last step."""
    loop: Any = trainer.fit_loop.epoch_loop
    return loop.batch_progress.current.ready == 0 or loop.batch_progress.is_last_batch or steps_after_batch(trainer)
