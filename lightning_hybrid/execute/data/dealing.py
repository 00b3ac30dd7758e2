"""How an epoch's samples are dealt to the replicas: arithmetic alone, the same on every rank.

With R replicas, sample i of the order in which one process would read goes to replica i mod R, and R x b consecutive
samples are a global batch, where b is the loader's `batch_size`. All replicas make equally many steps. If the samples
do not fill the last global batch, some replicas have one fewer in it; a replica that has none left runs a sample once
more, which counts for nothing (see `Uneven`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Uneven:
    """A global batch of which the replicas have different numbers of samples."""

    counts: tuple[int, ...]
    """Samples that count, by replica."""
    sizes: tuple[int, ...]
    """Samples that are run, by replica: at least one."""

    def factor(self, replica: int) -> float:
        """The factor on a replica's mean loss, so that the mean over replicas is the mean over the global batch."""
        return self.counts[replica] * len(self.counts) / sum(self.counts)

    def absent(self, replica: int) -> bool:
        """Whether what the replica runs counts for nothing."""
        return self.counts[replica] == 0

    @property
    def common_divisor(self) -> int:
        """The largest number into which every replica's batch can be split."""
        return math.gcd(*self.sizes)


def added(parts: Sequence[Uneven]) -> Uneven:
    """Of several batches that are run as one."""
    counts, sizes = zip(*((p.counts, p.sizes) for p in parts), strict=True)
    return Uneven(counts=tuple(map(sum, zip(*counts))), sizes=tuple(map(sum, zip(*sizes))))  # noqa: B905


def even(replicas: int, size: int) -> Uneven:
    """A batch of `size` samples on every replica."""
    return Uneven(counts=(size,) * replicas, sizes=(size,) * replicas)


class Share(NamedTuple):
    """What one replica reads for one step."""

    keys: list[Any]
    """Keys into the dataset."""
    positions: list[int]
    """Their places in the order of one process."""
    uneven: Uneven | None
    """None where every replica has equally many."""


def deal_samples(
    order: Iterable[Any],
    batch_size: int,
    replica: int,
    replicas: int,
    *,
    drop_last: bool = False,
    first: int = 0,
) -> Iterator[Share]:
    """Deals single samples: number i goes to replica i mod `replicas`.

    Args:
        order: Keys of the samples in the order of one process.
        batch_size: Samples of a replica in a step.
        replica: The replica that asks.
        replicas: How many there are.
        drop_last: Whether a last global batch that is not full is left out.
        first: Samples at the beginning that have been used already.
    """
    keys = islice(order, first, None)
    whole = batch_size * replicas
    while chunk := list(islice(keys, whole)):
        size = len(chunk)
        if size < whole and drop_last:
            return
        uneven = None
        own = range(replica, size, replicas)
        if size % replicas:
            counts = tuple(len(range(r, size, replicas)) for r in range(replicas))
            uneven = Uneven(counts=counts, sizes=tuple(max(1, c) for c in counts))
        places = own or range(1)
        yield Share([chunk[i] for i in places], [first + i for i in places], uneven)
        first += size


def deal_batches(batches: Iterable[Sequence[Any]], replica: int, replicas: int, *, first: int = 0) -> Iterator[Share]:
    """Deals whole batches: number k goes to replica k mod `replicas`.

    A replica for which there is none in the last step runs that of replica 0 again, which does not count.

    Args:
        batches: Keys of the samples of each batch.
        replica: The replica that asks.
        replicas: How many there are.
        first: Batches at the beginning that have been used already.
    """
    batches, position = iter(batches), 0
    for batch in islice(batches, first):
        position += len(batch)
    while group := list(islice(batches, replicas)):
        starts = [position]
        for batch in group:
            starts.append(starts[-1] + len(batch))
        position = starts[-1]
        counts = tuple(len(group[r]) if r < len(group) else 0 for r in range(replicas))
        sizes = tuple(c if r < len(group) else len(group[0]) for r, c in enumerate(counts))
        uneven = Uneven(counts=counts, sizes=sizes) if len(set(counts)) > 1 else None
        own = replica if replica < len(group) else 0
        yield Share(list(group[own]), list(range(starts[own], starts[own + 1])), uneven)


def steps_of_samples(count: int, batch_size: int, replicas: int, *, drop_last: bool = False) -> int:
    """Steps in which `count` samples are used."""
    whole = batch_size * replicas
    return count // whole if drop_last else -(-count // whole)


def steps_of_batches(count: int, replicas: int) -> int:
    """Steps in which `count` batches are used."""
    return -(-count // replicas)


def length_before_limit(steps: int, limit: int | float) -> int:
    """The smallest length of which Lightning's `limit_*_batches` leaves at least `steps` steps."""
    if isinstance(limit, int) or limit == 1.0 or limit <= 0.0:
        return steps
    length = math.ceil(steps / limit)
    while int((length - 1) * limit) >= steps:  # rounding of the product is Lightning's
        length -= 1
    while int(length * limit) < steps:
        length += 1
    return length
