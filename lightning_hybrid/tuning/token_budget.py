"""Finds the token budget of batches that fits into memory, and their number of microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl

from lightning_hybrid._lightning_private import set_epoch_length
from lightning_hybrid.dataloader.map_shard import MapShard
from lightning_hybrid.dataloader.peek import batch_of
from lightning_hybrid.dataloader.wrap import users_loader
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.tuning.memory_probe.probe import MemoryProbe


@runtime_checkable
class TokenBatches(Protocol):
    """A batch sampler with a token budget, such as `data.TokenBatchSampler`."""

    lengths: list[int]
    """Tokens of each sample."""
    max_tokens: int
    """Tokens per batch, padding included; can be set between two epochs."""
    multiple_of: int
    """Divisor of the number of samples of every batch."""

    def extremes(self) -> tuple[int, int]:
        """Returns the indices of a longest and of a shortest sample."""
        ...


class TokenBudget:
    """The token budget of a training loader's batches.

    Args:
        trainer: The trainer.
        runner: The partitioned module.
        loader: The training loader, as the ranks iterate it.
        sampler: The batch sampler of the loader.
    """

    def __init__(self, trainer: pl.Trainer, runner: StepRunner, loader: Any, sampler: TokenBatches) -> None:
        self._trainer, self._loader, self._sampler = trainer, loader, sampler
        self.microbatches = runner.microbatches_of(sampler.multiple_of)
        """Number of microbatches per batch, under `pp`."""

    @classmethod
    def of(cls, trainer: pl.Trainer, runner: StepRunner, loader: Any) -> TokenBudget | None:
        """Returns the token budget of a loader's batches; None if they have none."""
        sampler = getattr(users_loader(loader), "batch_sampler", None)
        sharded = isinstance(getattr(loader, "replica_shard", None), MapShard)
        return cls(trainer, runner, loader, sampler) if sharded and isinstance(sampler, TokenBatches) else None

    @property
    def tokens(self) -> int:
        """Tokens per batch of one replica."""
        return self._sampler.max_tokens

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restores the budget of the user's sampler at exit."""
        tokens = self.tokens
        try:
            yield
        finally:
            self._sampler.max_tokens = tokens

    def change(self, tokens: int) -> None:
        """Sets the tokens per batch of the next epoch, at least as many as the longest sample needs."""
        self._sampler.max_tokens = max(tokens, self._sampler.multiple_of * max(self._sampler.lengths))
        shard = self._loader.replica_shard
        set_epoch_length(self._trainer, shard, shard.steps_in_all())

    def find(self, limit: int, probe_for: Callable[[Any, int], MemoryProbe]) -> int:
        """Returns the largest budget up to `limit` that fits into the memory of all ranks. Collective.

        With T tokens in b samples of length L, a step needs at most a + b T + c T L + d T / L bytes: what every token
        needs, attention's squares, and what every sample needs. That is convex in L, so its maximum is at the longest
        or at the shortest samples, and both are tried.

        Args:
            limit: Largest budget, in tokens.
            probe_for: Returns a probe for a batch with samples and a number of microbatches.
        """
        count, step = self.microbatches, self._sampler.multiple_of // self.microbatches
        longest, shortest = (self._one(i) for i in self._sampler.extremes())
        tokens = limit
        for batch, length in (longest, shortest):
            most = min(tokens // (length * count), -(-len(self._sampler.lengths) // count))
            ladder = list(range(step, most + 1, step)) or [step]
            size = probe_for(batch, count).find(ladder).size
            if size < ladder[-1]:
                tokens = min(tokens, size * count * length)
        return max(tokens, count * step * longest[1])

    def _one(self, index: int) -> tuple[Any, int]:
        """Returns a batch of one sample, and the sample's length."""
        return batch_of(self._loader, [index]), self._sampler.lengths[index]
