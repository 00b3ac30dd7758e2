"""Advances learning-rate schedulers by samples while the batch size changes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class SchedulersBySamples:
    """Advances schedulers of interval `"step"` by samples: as often as with steps of the first batch size.

    Args:
        trainer: The trainer.
        first_batch_size: Global batch size at which one step of training is one step of a scheduler.
    """

    def __init__(self, trainer: pl.Trainer, first_batch_size: int) -> None:
        self._trainer, self._first_size = trainer, first_batch_size
        self._samples = self._next = 0
        self._frequencies: dict[int, int] = {}
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau:
                # Lightning applies the frequency to batches, whose size changes; here it applies to samples
                self._frequencies[id(config.scheduler)] = config.frequency
                config.frequency = 1
        self._module: Any = trainer.lightning_module
        self._original = self._module.lr_scheduler_step
        if self._frequencies:
            self._module.__dict__["lr_scheduler_step"] = self._step

    def before_step(self, samples: int, batch_size: int) -> None:
        """Prepares a step of `batch_size` samples, after steps with `samples` samples in total."""
        self._samples, self._next = samples, samples + batch_size

    def _step(self, scheduler: Any, metric: Any) -> None:
        frequency = self._frequencies.get(id(scheduler))
        times = 1
        if frequency is not None:
            each = self._first_size * frequency
            times = self._next // each - self._samples // each
        for _ in range(times):
            self._original(scheduler, metric)

    def release(self) -> None:
        """Restores Lightning's schedule."""
        self._module.__dict__.pop("lr_scheduler_step", None)
        for config in self._trainer.lr_scheduler_configs:
            config.frequency = self._frequencies.get(id(config.scheduler), config.frequency)
