"""How a global batch is divided: over replicas, into batches that are accumulated, into microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchDivision:
    """One replica's way through its share of a global batch."""

    batch_size: int
    """Samples of a replica in one batch of its loader."""
    accumulate: int
    """Batches whose gradients are added up before the optimizer's step."""
    microbatches: int
    """Parts of a batch that go through a pipeline one after the other; 1 without one."""

    @property
    def per_replica(self) -> int:
        """Samples of a replica in a step of the optimizer."""
        return self.batch_size * self.accumulate

    @property
    def micro_batch_size(self) -> int:
        """Samples that are run at once."""
        return self.batch_size // self.microbatches

    def __str__(self) -> str:
        parts = f" in {self.microbatches} microbatches" if self.microbatches > 1 else ""
        return f"{self.accumulate} x {self.batch_size} samples a replica{parts}"


@dataclass(frozen=True, kw_only=True)
class DivisionLimits:
    """What a division has to keep to."""

    replicas: int
    """Replicas that share a global batch."""
    micro_batch_size: int
    """The largest micro-batch, in samples."""
    max_microbatches: int = 1
    """How many of them a batch may be split into; 1 without a pipeline."""
    runs: Callable[[int], bool] = lambda count: True
    """Whether the pipeline schedule can run so many microbatches."""
    batch_size: int | None = None
    """The loader's batch size, where it cannot be changed."""
    min_parts: int = 1
    """Gradients of parts that a step must give: 2 for the statistics."""


def divide(global_batch: int, limits: DivisionLimits) -> BatchDivision | None:
    """The division with the largest micro-batches, and of these the one with the fewest accumulated batches.

    Returns:
        None if there is none: `global_batch` is no multiple of the replicas, or of the fixed batch size.
    """
    share, rest = divmod(global_batch, limits.replicas)
    if rest or not share:
        return None
    for micro in _divisors_downwards(share, limits.micro_batch_size):
        for count in range(min(limits.max_microbatches, share // micro), 0, -1):
            batch = micro * count
            if share % batch or not limits.runs(count) or limits.batch_size not in (None, batch):
                continue
            if limits.replicas * (share // micro) >= limits.min_parts:
                return BatchDivision(batch_size=batch, accumulate=share // batch, microbatches=count)
    return None


def micro_batch_sizes(global_batches: Iterable[int], limits: DivisionLimits) -> list[int]:
    """The micro-batches into which some of these global batches can be divided, ascending."""
    sizes: set[int] = set()
    for batch in global_batches:
        share, rest = divmod(batch, limits.replicas)
        if not rest:
            sizes.update(_divisors_downwards(share, share))
    if limits.batch_size is not None:
        sizes = {s for s in sizes if limits.batch_size % s == 0 and limits.batch_size // s <= limits.max_microbatches}
    return sorted(sizes)


def _divisors_downwards(number: int, at_most: int) -> list[int]:
    return [d for d in range(min(number, at_most), 0, -1) if number % d == 0]
