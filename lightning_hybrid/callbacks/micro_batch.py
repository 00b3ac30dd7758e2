"""For `AdaptiveBatchSize`: what a rank runs at once, in samples or in tokens; found before training, halved in it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hybrid.adapt.division import BatchDivision, micro_batch_sizes
from lightning_hybrid.tuning.batch_size import BatchSizeController
from lightning_hybrid.tuning.device_memory import share_of_memory

LADDER = 64
"""Sizes are tried up to so many times the first one, where nothing else limits them."""

Memory = int | float | Literal["device"]


class MicroBatch:
    """The largest part that a rank runs at once.

    Args:
        memory: What a rank may use to find it (see `AdaptiveBatchSize`); None: what the user's batches have.
        most: It is no larger, in samples, or in tokens of a budget.

    Raises:
        ValueError: If `memory` is none.
    """

    def __init__(self, memory: Memory | None, most: int | None) -> None:
        wrong = isinstance(memory, int) and memory < 1 or isinstance(memory, float) and not 0 < memory <= 1
        if wrong or not (memory in ("device", None) or isinstance(memory, int | float)):
            raise ValueError(f"`memory` must be bytes, a share up to 1.0, 'device' or None. Got {memory!r}.")
        self.memory: Memory | None = memory
        self._most = most
        self.samples: int | None = None
        """As found, or halved since; None: that of the user's batches."""
        self.tokens: int | None = None
        """The same of a replica's batch with a token budget."""
        self._short_steps = 0

    @property
    def is_sought(self) -> bool:
        """Whether it is to be found in samples."""
        return self.memory is not None and self.samples is None

    def find(self, control: BatchSizeController, device: torch.device, batches: Sequence[int]) -> None:
        """The largest that fits on all ranks and that one of these global batches can be made of. Collective.

        Args:
            control: Of the batches.
            device: This rank's.
            batches: Global batch sizes, in samples.
        """
        sizes = micro_batch_sizes(batches, control.limits(max(batches), 1))
        found = control.find_micro_batch(sizes, self._bytes_on(device))
        rank_zero_info(
            f"AdaptiveBatchSize: micro-batches of up to {found.size} samples fit; rank {found.limited_by} has no "
            f"memory for more. Peak on rank 0: {found.measured_bytes / 2**20:.0f} MiB."
        )
        self.samples = found.size

    def find_budget(self, control: BatchSizeController, device: torch.device, max_batch_size: int | None) -> None:
        """Gives the batches the largest token budget that fits on all ranks. Collective.

        Args:
            control: Of batches that have a budget.
            device: This rank's.
            max_batch_size: The limit of a global batch, in tokens.
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
        """That a rank may use; None: what the device has."""
        if isinstance(self.memory, float):
            return share_of_memory(device, self.memory)
        return None if isinstance(self.memory, str) else self.memory

    def within(self, first: BatchDivision) -> int:
        """The largest there may be, in samples, where the user's batches are divided like `first`."""
        return min(self.samples or first.micro_batch_size, self._most or sys.maxsize)

    def halve_if_short(self, control: BatchSizeController) -> bool:
        """After two steps in a row that ran short of memory: half of it, before one fails. Collective.

        Returns:
            Whether batches of samples have to be divided anew; those of tokens are halved in the next epoch.
        """
        if self.memory is None:
            return False
        self._short_steps = self._short_steps + 1 if control.memory_is_short() else 0
        micro = control.division.micro_batch_size
        if self._short_steps < 2 or micro < 2:
            return False
        self._short_steps = 0
        if control.budget is None:
            self.samples = micro // 2
            return True
        self.tokens = micro // 2
        rank_zero_warn("AdaptiveBatchSize: memory was short in two steps, so batches are halved in the next epoch.")
        control.change_budget_later(self.tokens)
        return False


def warn_of_memory(control: BatchSizeController, rank: int) -> None:
    """Says how a run that has ended without memory on this rank goes on."""
    size, unit = control.division.micro_batch_size, "samples" if control.budget is None else "tokens"
    warnings.warn(
        f"AdaptiveBatchSize: rank {rank} ran out of memory with micro-batches of {size} {unit}. Restart from the last "
        f"checkpoint with `max_micro_batch_size={max(1, size // 2)}`; the global batch stays.",
        stacklevel=2,
    )
