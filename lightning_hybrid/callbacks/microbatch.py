"""The microbatch of `AdaptiveBatchSize`: found before training, halved when memory runs short."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hybrid.adapt.division import BatchDivision, microbatch_sizes
from lightning_hybrid.device_memory import share_of_memory
from lightning_hybrid.tuning.batch_size import BatchSizeController

LADDER = 64
"""Upper limit of the search, as a multiple of the first size, where nothing else limits it. Empirical."""

Memory = int | float | Literal["device"]


class Microbatch:
    """The largest microbatch that a rank runs.

    Args:
        memory: Memory per rank for the search (see `AdaptiveBatchSize`); None: no search.
        most: Upper limit, in samples, or in tokens with a token budget.

    Raises:
        ValueError: If `memory` is not one of its possible values.
    """

    def __init__(self, memory: Memory | None, most: int | None) -> None:
        wrong = isinstance(memory, int) and memory < 1 or isinstance(memory, float) and not 0 < memory <= 1
        if wrong or not (memory in ("device", None) or isinstance(memory, int | float)):
            raise ValueError(f"`memory` must be bytes, a fraction up to 1.0, 'device' or None. Got {memory!r}.")
        self.memory: Memory | None = memory
        self._most = most
        self.samples: int | None = None
        """Samples of the largest microbatch, as found or halved since; None: that of the loader's batches."""
        self.tokens: int | None = None
        """Tokens of the largest batch of a replica with a token budget; None: that of the loader's batches."""
        self._short_steps = 0

    @property
    def is_sought(self) -> bool:
        """True if the microbatch in samples has yet to be searched."""
        return self.memory is not None and self.samples is None

    def find(self, control: BatchSizeController, device: torch.device, batches: Sequence[int]) -> None:
        """Finds the largest microbatch that fits on all ranks and divides one of `batches`. Collective.

        Args:
            control: Runs the trial steps.
            device: Device of this rank.
            batches: Global batch sizes, in samples.
        """
        sizes = microbatch_sizes(batches, control.limits(max(batches), 1))
        found = control.find_microbatch(sizes, self._bytes_on(device))
        rank_zero_info(
            f"AdaptiveBatchSize: microbatches of up to {found.size} samples fit, limited by the memory of rank "
            f"{found.limited_by}. Peak on rank 0: {found.measured_bytes / 2**20:.0f} MiB."
        )
        self.samples = found.size

    def find_budget(self, control: BatchSizeController, device: torch.device, max_batch_size: int | None) -> None:
        """Sets the largest token budget that fits on all ranks. Collective.

        Args:
            control: Controller of batches with a token budget.
            device: Device of this rank.
            max_batch_size: Upper limit of a global batch, in tokens.
        """
        if self.tokens is None and self.memory is not None:
            limit = LADDER * control.first.batch_size
            if max_batch_size is not None:
                limit = max_batch_size // (control.replicas * control.division.accumulate)
            self.tokens = control.find_token_budget(limit, self._bytes_on(device))
            rank_zero_info(f"AdaptiveBatchSize: batches of up to {self.tokens} tokens fit.")
        budget = min(self.tokens or control.first.batch_size, self._most or sys.maxsize)
        if budget != control.first.batch_size:
            self.tokens = budget
            control.change_budget(budget)

    def _bytes_on(self, device: torch.device) -> int | None:
        """Returns the memory limit of this rank in bytes; None: all memory of `device`."""
        if isinstance(self.memory, float):
            return share_of_memory(device, self.memory)
        return None if isinstance(self.memory, str) else self.memory

    def within(self, first: BatchDivision) -> int:
        """Returns the largest microbatch, in samples, if the loader's batches are divided like `first`."""
        return min(self.samples or first.microbatch_size, self._most or sys.maxsize)

    def halve_if_short(self, control: BatchSizeController) -> bool:
        """Halves the microbatch after two consecutive steps that ran short of memory, before one fails. Collective.

        Returns:
            True if batches of samples have to be divided again; batches of tokens are halved in the next epoch.
        """
        if self.memory is None:
            return False
        self._short_steps = self._short_steps + 1 if control.memory_is_short() else 0
        micro = control.division.microbatch_size
        if self._short_steps < 2 or micro < 2:
            return False
        self._short_steps = 0
        if control.budget is None:
            self.samples = micro // 2
            return True
        self.tokens = micro // 2
        rank_zero_warn("AdaptiveBatchSize: memory ran short in two consecutive steps; batches are halved next epoch.")
        control.change_budget_later(self.tokens)
        return False


def warn_of_memory(control: BatchSizeController, rank: int) -> None:
    """Warns after an out-of-memory failure on this rank with the argument to restart with."""
    size, unit = control.division.microbatch_size, "samples" if control.budget is None else "tokens"
    warnings.warn(
        f"AdaptiveBatchSize: rank {rank} ran out of memory with microbatches of {size} {unit}. Restart from the last "
        f"checkpoint with `max_microbatch_size={max(1, size // 2)}`; the global batch does not change.",
        stacklevel=2,
    )
