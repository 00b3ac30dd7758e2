"""Sharding of samples over replicas: every sample once, equally many steps, the global batches of one process."""

from __future__ import annotations

import itertools

import pytest

from lightning_hybrid.dataloader.sharding import (
    BatchWeights,
    Share,
    added,
    even,
    length_before_limit,
    shard_batches,
    shard_samples,
    steps_of_batches,
    steps_of_samples,
)

COUNTS = [0, 1, 2, 3, 7, 8, 9, 16, 23, 24, 25]
REPLICAS = [1, 2, 3, 4, 8]
SIZES = [1, 2, 3, 8]


def real(share: Share, replica: int) -> list:
    """The keys of a share that count."""
    return [] if share.batch_weights is not None and share.batch_weights.padding(replica) else share.keys


def sharded(count: int, size: int, replicas: int, **options) -> list[list[Share]]:
    order = [f"sample {i}" for i in range(count)]
    return [list(shard_samples(order, size, r, replicas, **options)) for r in range(replicas)]


@pytest.mark.parametrize(("count", "replicas", "size"), list(itertools.product(COUNTS, REPLICAS, SIZES)))
def test_samples(count, replicas, size):
    shares = sharded(count, size, replicas)
    whole = size * replicas
    assert {len(s) for s in shares} == {steps_of_samples(count, size, replicas)}, "equally many steps"
    for step, together in enumerate(zip(*shares, strict=True)):
        wanted = [f"sample {i}" for i in range(step * whole, min(count, (step + 1) * whole))]
        kept = [real(share, r) for r, share in enumerate(together)]
        interleaved = [k[i] for i in range(size) for k in kept if i < len(k)]
        assert interleaved == wanted, "the batch of one process, sample i on replica i mod R"
        for r, share in enumerate(together):
            assert share.keys, "nobody is without a batch"
            assert share.keys == [f"sample {p}" for p in share.positions]
            expected = [len(k) for k in kept]
            if share.batch_weights is None:
                assert len(set(expected)) == 1
                assert len(share.keys) == expected[r]
            else:
                assert share.batch_weights.counts == tuple(expected)
                assert share.batch_weights.sizes[r] == len(share.keys)


@pytest.mark.parametrize(("count", "replicas", "size"), list(itertools.product(COUNTS, REPLICAS, SIZES)))
def test_drop_last_truncates_to_the_global_batch(count, replicas, size):
    shares = sharded(count, size, replicas, drop_last=True)
    steps = count // (size * replicas)
    assert steps == steps_of_samples(count, size, replicas, drop_last=True)
    for r, own in enumerate(shares):
        assert [k for share in own for k in share.keys] == [
            f"sample {i}" for i in range(r, steps * size * replicas, replicas)
        ]
        assert all(share.batch_weights is None for share in own)


@pytest.mark.parametrize(("count", "replicas", "size"), list(itertools.product([7, 24, 25], REPLICAS, SIZES)))
def test_what_was_used_is_left_out(count, replicas, size):
    for first in (0, 1, 5, count):
        rest = sharded(count, size, replicas, first=first)
        kept = {k for r, own in enumerate(rest) for share in own for k in real(share, r)}
        assert kept == {f"sample {i}" for i in range(first, count)}
        assert all(share.keys == [f"sample {p}" for p in share.positions] for own in rest for share in own)


def test_an_endless_order_is_read_as_it_goes():
    shares = shard_samples(itertools.count(), 2, 1, 3)
    assert [next(shares).keys for _ in range(3)] == [[1, 4], [7, 10], [13, 16]]


@pytest.mark.parametrize("replicas", REPLICAS)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("first", [0, 2])
def test_batches(count, replicas, first):
    lengths = [(3 * i) % 5 + 1 for i in range(count)]
    starts = [sum(lengths[:i]) for i in range(count + 1)]
    batches = [list(range(starts[i], starts[i + 1])) for i in range(count)]
    shares = [list(shard_batches(batches, r, replicas, first=first)) for r in range(replicas)]
    assert {len(s) for s in shares} == {steps_of_batches(max(0, count - first), replicas)}
    for step, together in enumerate(zip(*shares, strict=True)):
        group = batches[first + step * replicas : first + (step + 1) * replicas]
        assert [k for r, s in enumerate(together) if (k := real(s, r))] == group
        for r, share in enumerate(together):
            assert share.positions == share.keys, "keys are positions here"
            counts = tuple(len(group[i]) if i < len(group) else 0 for i in range(replicas))
            assert (share.batch_weights.counts if share.batch_weights else (len(share.keys),) * replicas) == counts
            assert share.batch_weights is None or share.batch_weights.sizes[r] == len(share.keys)


def test_the_weighted_mean_over_replicas_is_that_over_samples():
    losses = [[1.0, 5.0, 3.0], [2.0, 8.0], [4.0, 7.0], [100.0]]
    batch_weights = BatchWeights(counts=(3, 2, 2, 0), sizes=(3, 2, 2, 1))
    means = [sum(x) / len(x) * batch_weights.factor(r) for r, x in enumerate(losses)]
    assert sum(means) / 4 == pytest.approx((1 + 5 + 3 + 2 + 8 + 4 + 7) / 7)
    assert batch_weights.padding(3)
    assert not batch_weights.padding(2)
    assert even(4, 6).factor(2) == 1.0


def test_all_replicas_can_split_their_batch_into_as_many_microbatches():
    assert BatchWeights(counts=(6, 4, 4), sizes=(6, 4, 4)).common_divisor == 2
    assert BatchWeights(counts=(4, 0), sizes=(4, 1)).common_divisor == 1
    assert added([even(2, 3), BatchWeights(counts=(1, 0), sizes=(1, 1))]).counts == (4, 3)


@pytest.mark.parametrize("limit", [0.05, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.99, 1.0, 3])
def test_lightning_applies_a_fraction_to_the_length_once_more(limit):
    for steps in range(1, 40):
        length = length_before_limit(steps, limit)
        assert (int(length * limit) if isinstance(limit, float) else length) >= steps
        if isinstance(limit, float):
            assert int((length - 1) * limit) < steps, "no longer than needed"
