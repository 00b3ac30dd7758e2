"""Division of a global batch into replicas, accumulated batches and microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchDivision:
    """Division of one replica's share of a global batch."""

    batch_size: int
    """Samples per replica in one batch of the loader."""
    accumulate: int
    """Batches whose gradients are accumulated before an optimizer step."""
    microbatches: int
    """Microbatches of a batch under a pipeline; 1 without one."""

    @property
    def per_replica(self) -> int:
        """Samples per replica in an optimizer step."""
        return self.batch_size * self.accumulate

    @property
    def microbatch_size(self) -> int:
        """Samples in one forward pass."""
        return self.batch_size // self.microbatches

    def __str__(self) -> str:
        parts = f" in {self.microbatches} microbatches" if self.microbatches > 1 else ""
        return f"{self.accumulate} x {self.batch_size} samples per replica{parts}"


@dataclass(frozen=True, kw_only=True)
class DivisionLimits:
    """Constraints of a division."""

    replicas: int
    """Number of replicas."""
    microbatch_size: int
    """The largest microbatch, in samples."""
    max_microbatches: int = 1
    """Upper limit of the microbatches of a batch; 1 without a pipeline."""
    runs: Callable[[int], bool] = lambda count: True
    """Returns True if the pipeline schedule can run this number of microbatches."""
    batch_size: int | None = None
    """The loader's batch size if it cannot be changed."""
    min_parts: int = 1
    """Lower limit of the parts of a step whose gradients are compared: 2 for the noise statistics."""


def divide(global_batch: int, limits: DivisionLimits) -> BatchDivision | None:
    """Finds the division with the largest microbatches, and among these the fewest accumulated batches.

    Returns:
        None if `global_batch` is not a multiple of the replicas or of the fixed batch size.
    """
    share, rest = divmod(global_batch, limits.replicas)
    if rest or not share:
        return None
    for micro in _divisors_downwards(share, limits.microbatch_size):
        for count in range(min(limits.max_microbatches, share // micro), 0, -1):
            batch = micro * count
            if share % batch or not limits.runs(count) or limits.batch_size not in (None, batch):
                continue
            if limits.replicas * (share // micro) >= limits.min_parts:
                return BatchDivision(batch_size=batch, accumulate=share // batch, microbatches=count)
    return None


def microbatch_sizes(global_batches: Iterable[int], limits: DivisionLimits) -> list[int]:
    """Returns the microbatch sizes into which at least one of `global_batches` can be divided, ascending."""
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
