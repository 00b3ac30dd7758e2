"""Shards an epoch's samples over the replicas: pure arithmetic, the same on every rank.

With R replicas, sample i of the order of a single process goes to replica i mod R, and R x b consecutive samples are a
global batch, where b is the loader's `batch_size`. All replicas run the same number of steps. If the last global batch
is incomplete, some replicas have one sample fewer in it; a replica without a sample runs one as padding, with weight 0
(see `BatchWeights`). Gradients are weighted by tokens if batches have the token counts of their samples (see `Tokens`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from lightning_hybrid.adapt.shares import pack, sequence_cost


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of a global batch: the loss of a step is the mean over them.

    Used if the batches of a batch sampler have an attribute `lengths`, the tokens of each sample.
    """

    counts: tuple[int, ...]
    """Tokens of each replica; 0 for one that runs padding."""
    own: tuple[int, ...]
    """Tokens of each sample that this replica runs."""
    number: int
    """Index of the global batch in the pass."""
    totals: tuple[int, ...]
    """Tokens of every global batch of the pass."""

    def share(self, batches: int, total: int) -> float:
        """Returns the factor on a batch's gradient in the mean over `batches` accumulated ones with `total` tokens."""
        return sum(self.counts) * batches / total

    def weights(self, parts: int) -> list[float]:
        """Returns the factors on the losses of `parts` equal parts, so that their mean is the mean over tokens."""
        size, total = len(self.own) // parts, sum(self.own)
        return [sum(self.own[i * size : (i + 1) * size]) * parts / total for i in range(parts)]


@dataclass(frozen=True, kw_only=True)
class BatchWeights:
    """Weights of a global batch with different numbers of samples per replica, or weighted by tokens."""

    counts: tuple[int, ...]
    """Samples of each replica without padding."""
    sizes: tuple[int, ...]
    """Samples that each replica runs, padding included: at least one."""
    tokens: Tokens | None = None
    """Token counts, if gradients are weighted by tokens."""

    def factor(self, replica: int) -> float:
        """Returns the factor on a replica's mean loss, so that the mean over replicas is that over the global batch."""
        counts = self.counts if self.tokens is None else self.tokens.counts
        return counts[replica] * len(counts) / sum(counts)

    def padding(self, replica: int) -> bool:
        """Returns True if the replica runs padding only."""
        return self.counts[replica] == 0

    @property
    def common_divisor(self) -> int:
        """The largest number of equal parts into which every replica's batch can be split."""
        return math.gcd(*self.sizes)


def added(parts: Sequence[BatchWeights]) -> BatchWeights:
    """Returns the weights of several batches that are run as one."""
    counts, sizes = zip(*((p.counts, p.sizes) for p in parts), strict=True)
    return BatchWeights(counts=tuple(map(sum, zip(*counts))), sizes=tuple(map(sum, zip(*sizes))))  # noqa: B905


def even(replicas: int, size: int) -> BatchWeights:
    """Returns the weights of a batch of `size` samples on every replica."""
    return BatchWeights(counts=(size,) * replicas, sizes=(size,) * replicas)


class Share(NamedTuple):
    """The samples that one replica reads for one step."""

    keys: list[Any]
    """Keys into the dataset."""
    positions: list[int]
    """Positions of the samples in the order of a single process."""
    batch_weights: BatchWeights | None
    """None if every replica has the same number of samples."""


@dataclass(frozen=True, kw_only=True)
class ByShares:
    """Divides a global batch among replicas of different speed: `shares[r]` consecutive samples for replica r."""

    shares: tuple[int, ...]
    """Samples of each replica."""
    lengths: None = None
    """None: gradients are weighted by samples."""

    def divide(self, keys: Sequence[Any], replicas: int) -> list[Sequence[int]]:
        """Returns the positions in `keys` of each replica's samples."""
        ends = list(itertools.accumulate(self.shares))
        return [range(end - share, end) for share, end in zip(self.shares, ends, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ByLength:
    """Divides a global batch of sequences of different lengths so that all ranks have the same cost."""

    lengths: Sequence[int]
    """Tokens of the sample with each key, by which gradients are weighted."""
    width: int
    """Width of the model, h (see `adapt.shares.sequence_cost`)."""
    parts: int = 1
    """Microbatches of a replica's batch, which are balanced, too."""

    def divide(self, keys: Sequence[int], replicas: int) -> list[Sequence[int]]:
        """Returns the positions in `keys` of each replica's samples, by microbatch; all have equally many."""
        bins, size = replicas * self.parts, len(keys) // (replicas * self.parts)
        packed = pack([sequence_cost(self.lengths[k], self.width) for k in keys], bins, size)
        return [[i for b in packed[r * self.parts : (r + 1) * self.parts] for i in b] for r in range(replicas)]


Division = ByShares | ByLength
"""How a full global batch is divided among replicas, if not round-robin."""


def shard_samples(
    order: Iterable[Any],
    batch_size: int,
    replica: int,
    replicas: int,
    *,
    drop_last: bool = False,
    first: int = 0,
    division: Division | None = None,
) -> Iterator[Share]:
    """Yields one replica's samples of each step: sample i goes to replica i mod `replicas`, or by `division`.

    Args:
        order: Keys of the samples in the order of a single process.
        batch_size: Samples per replica and step.
        replica: Index of the replica.
        replicas: Number of replicas.
        drop_last: Whether an incomplete last global batch is left out.
        first: Number of samples at the beginning that have been used already.
        division: Division of full global batches; an incomplete one is divided round-robin.
    """
    whole, lengths = batch_size * replicas, None if division is None else division.lengths
    totals: tuple[int, ...] = ()
    if lengths is not None:
        order = list(order)
        tokens = [lengths[key] for key in order[first:]]
        totals = tuple(sum(tokens[i : i + whole]) for i in range(0, len(tokens), whole))
    keys = islice(order, first, None)
    for number in itertools.count():
        chunk = list(islice(keys, whole))
        size = len(chunk)
        if not size or (size < whole and drop_last):
            return
        places: list[Sequence[int]] = []  # of all replicas, unless they have equal numbers of samples round-robin
        if division is not None and size == whole:
            places = division.divide(chunk, replicas)
        elif size % replicas or lengths is not None:
            places = [range(r, size, replicas) for r in range(replicas)]
        own = (places[replica] if places else range(replica, size, replicas)) or range(1)
        batch_weights = _batch_weights_of(places)
        if lengths is not None:
            by_replica = tuple(sum(lengths[chunk[i]] for i in of_replica) for of_replica in places)
            of_own = tuple(lengths[chunk[i]] for i in own)
            weights = Tokens(counts=by_replica, own=of_own, number=number, totals=totals)
            batch_weights = replace(batch_weights or even(replicas, batch_size), tokens=weights)
        yield Share([chunk[i] for i in own], [first + i for i in own], batch_weights)
        first += size


def _batch_weights_of(places: Sequence[Sequence[int]]) -> BatchWeights | None:
    counts = tuple(map(len, places))
    return BatchWeights(counts=counts, sizes=tuple(max(1, c) for c in counts)) if len(set(counts)) > 1 else None


def shard_batches(batches: Iterable[Sequence[Any]], replica: int, replicas: int, *, first: int = 0) -> Iterator[Share]:
    """Yields one replica's batches: batch k goes to replica k mod `replicas`.

    A replica without a batch in the last step runs that of replica 0 as padding. Batches in a list, each with an
    attribute `lengths`, are weighted by tokens.

    Args:
        batches: Keys of the samples of each batch.
        replica: Index of the replica.
        replicas: Number of replicas.
        first: Number of batches at the beginning that have been used already.
    """
    totals = _tokens_of_steps(batches, replicas, first)
    batches, position, number = iter(batches), 0, 0
    for batch in islice(batches, first):
        position += len(batch)
    while group := list(islice(batches, replicas)):
        starts = [position]
        for batch in group:
            starts.append(starts[-1] + len(batch))
        position = starts[-1]
        counts = tuple(len(group[r]) if r < len(group) else 0 for r in range(replicas))
        sizes = tuple(c if r < len(group) else len(group[0]) for r, c in enumerate(counts))
        batch_weights = BatchWeights(counts=counts, sizes=sizes) if len(set(counts)) > 1 else None
        own = replica if replica < len(group) else 0
        if totals:
            lengths = [tuple(getattr(batch, "lengths")) for batch in group]  # noqa: B009 -- see `_tokens_of_steps`
            tokens = tuple(sum(lengths[r]) if r < len(group) else 0 for r in range(replicas))
            of_step = Tokens(counts=tokens, own=lengths[own], number=number, totals=totals)
            batch_weights = BatchWeights(counts=counts, sizes=sizes, tokens=of_step)
        number += 1
        yield Share(list(group[own]), list(range(starts[own], starts[own + 1])), batch_weights)


def _tokens_of_steps(batches: Iterable[Sequence[Any]], replicas: int, first: int) -> tuple[int, ...]:
    if not isinstance(batches, list) or not all(hasattr(batch, "lengths") for batch in batches):
        return ()
    weighed: list[Any] = batches[first:]
    tokens = [sum(batch.lengths) for batch in weighed]
    return tuple(sum(tokens[i : i + replicas]) for i in range(0, len(tokens), replicas))


def steps_of_samples(count: int, batch_size: int, replicas: int, *, drop_last: bool = False) -> int:
    """Returns the number of steps for `count` samples."""
    whole = batch_size * replicas
    return count // whole if drop_last else -(-count // whole)


def steps_of_batches(count: int, replicas: int) -> int:
    """Returns the number of steps for `count` batches."""
    return -(-count // replicas)


def length_before_limit(steps: int, limit: int | float) -> int:
    """Returns the smallest length of which Lightning's `limit_*_batches` leaves at least `steps` steps."""
    if isinstance(limit, int) or limit == 1.0 or limit <= 0.0:
        return steps
    length = math.ceil(steps / limit)
    while int((length - 1) * limit) >= steps:  # rounding of the product is Lightning's
        length -= 1
    while int(length * limit) < steps:
        length += 1
    return length
