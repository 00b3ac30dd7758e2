"""`TokenThroughput`: logs tokens per second."""

import time
from typing import Any

from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch import LightningModule, Trainer

from lightning_hybrid._lightning_private import Callback
from lightning_hybrid.batches import count_tokens


class TokenThroughput(Callback):
    """Logs ``tokens_per_second`` of the global batch and shows it in the progress bar.

    The tokens of a batch are the elements of its first tensor, such as ``input_ids``, summed over data-parallel
    replicas. The first batch (warm-up) and the time spent in validation are excluded. All ranks log the value of rank
    0, so that the metrics agree on every rank.

    Args:
        every_n_batches: Training batches between two values; each is the mean over these batches.
    """

    def __init__(self, every_n_batches: int = 10) -> None:
        if every_n_batches < 1:
            raise ValueError(f"`every_n_batches` must be at least 1. Got {every_n_batches}.")
        self._every_n_batches = every_n_batches
        self._throughput = Throughput(window_size=2)  # the start and the end of a window of batches
        self._batches: int | None = None
        """Of the present window; None before the first batch has ended."""
        self._tokens = 0
        self._validation_seconds = 0.0
        self._validation_start_seconds: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discards the state of an earlier run."""
        self._batches = None
        self._validation_start_seconds = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts a batch; at the end of a window, logs its rate."""
        if self._batches is None:
            self._start_window()
            return
        self._batches += 1
        self._tokens += _tokens(batch)
        if self._batches < self._every_n_batches:
            return
        self._note(self._batches, self._tokens)
        sampler = trainer.distributed_sampler_kwargs
        replicas = sampler["num_replicas"] if sampler else 1
        rate = trainer.strategy.broadcast(self._throughput.compute()["device/items_per_sec"] * replicas)
        pl_module.log("tokens_per_second", rate, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        self._start_window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records when validation starts."""
        self._validation_start_seconds = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Excludes the time since validation started."""
        if self._validation_start_seconds is not None:
            self._validation_seconds += time.perf_counter() - self._validation_start_seconds
        self._validation_start_seconds = None

    def _start_window(self) -> None:
        self._throughput.reset()
        self._batches, self._tokens = 0, 0
        self._note(0, 0)

    def _note(self, batches: int, tokens: int) -> None:
        seconds = time.perf_counter() - self._validation_seconds
        self._throughput.update(time=seconds, batches=batches, samples=batches, lengths=tokens)


def _tokens(batch: Any) -> int:
    tokens = count_tokens(batch)
    if tokens is None:
        raise TypeError(
            f"`TokenThroughput` counts the elements of the first tensor of a batch. Got a batch of type "
            f"{type(batch).__name__} without a tensor. Remove the callback, or let the data module return tensors."
        )
    return tokens
