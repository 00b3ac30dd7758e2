"""Batches of a token budget, and weights by tokens."""

from __future__ import annotations

import pytest
import torch

from lightning_hybrid.data import TokenBatch, TokenBatchSampler
from lightning_hybrid.dataloader.sharding import BatchWeights, shard_batches

LENGTHS = [1 + (7 * i * i) % 61 for i in range(200)]


def sampler(tokens: int = 128, **options) -> TokenBatchSampler:
    return TokenBatchSampler(LENGTHS, tokens, **options)


@pytest.mark.parametrize("multiple_of", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bounds", [None, [8, 32, 61]])
def test_every_sample_once_within_the_budget(bounds, shuffle, multiple_of) -> None:
    batches = sampler(bounds=bounds, shuffle=shuffle, multiple_of=multiple_of)
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(i for batch in found for i in batch) == list(range(200))
    assert all(len(batch) * max(batch.lengths) <= 128 for batch in found)
    assert all(batch.lengths == [LENGTHS[i] for i in batch] for batch in found)
    assert sum(len(batch) % multiple_of > 0 for batch in found) <= 1
    assert len(found) < 0.75 * len(list(sampler(bounds=[61]))), "short samples are more to a batch"


def test_samples_of_a_bucket_are_as_many_as_its_bound_allows() -> None:
    batches = list(TokenBatchSampler([4] * 8 + [10] * 4 + [11], 40, bounds=[5, 11], shuffle=False))
    assert [len(b) for b in batches] == [8, 3, 2]


def test_what_is_left_goes_into_the_next_bucket() -> None:
    batches = list(TokenBatchSampler([4] * 9 + [10] * 5, 40, bounds=[5, 10], shuffle=False))
    assert [b.lengths for b in batches] == [[4] * 8, [4, 10, 10, 10], [10, 10]]
    dropped = TokenBatchSampler([4] * 9 + [10] * 5, 40, bounds=[5, 10], shuffle=False, drop_last=True)
    assert [len(b) for b in dropped] == [8, 4]
    assert len(dropped) == 2


def test_every_epoch_has_another_order() -> None:
    torch.manual_seed(1)
    by_global = sampler()
    own = sampler(generator=torch.Generator().manual_seed(1))
    for batches in (by_global, own):
        first, second = list(batches), list(batches)
        assert first != second
    assert list(sampler(shuffle=False)) == list(sampler(shuffle=False))


@pytest.mark.parametrize("length", [1, 2, 3, 64])
def test_lengths_that_are_all_equal(length: int) -> None:
    assert [len(b) for b in TokenBatchSampler([length] * 8, 4 * length)] == [4, 4]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "`lengths` must be at least 1"),
        ([4, 0], {}, "`lengths` must be at least 1"),
        ([4, 200], {}, "`max_tokens` must be at least the longest sample, of 200 tokens. Got 128"),
        ([4, 100], {"multiple_of": 2}, "`max_tokens` must be at least 2 times the longest sample"),
        ([4], {"multiple_of": 0}, "`multiple_of` must be at least 1"),
        ([4, 9], {"bounds": [4, 8]}, "`bounds` must ascend up to the longest sample, of 9 tokens"),
        ([4, 9], {"bounds": [9, 4]}, "`bounds` must ascend"),
    ],
)
def test_refused(lengths, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(lengths, 128, **options)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_the_weighted_mean_is_that_over_tokens(replicas: int) -> None:
    """Over replicas, accumulated batches and microbatches, with a last step that is not full."""
    batches = [
        TokenBatch([10 * b + i for i in range(n)], [3 + (b + i) % 5 for i in range(n)])
        for b, n in enumerate([2, 4, 2, 6, 4, 2, 2])
    ]
    losses = {i: float(torch.sin(torch.tensor(float(i)))) for batch in batches for i in batch}
    lengths = {i: n for batch in batches for i, n in zip(batch, batch.lengths, strict=True)}
    shares = [list(shard_batches(batches, r, replicas)) for r in range(replicas)]
    steps, total = len(shares[0]), sum(lengths.values())
    found = 0.0
    for replica, own in enumerate(shares):
        for share in own:
            batch_weights = share.batch_weights
            assert isinstance(batch_weights, BatchWeights)
            tokens = batch_weights.tokens
            assert tokens is not None
            means = []
            for half in range(2):
                part = share.keys[half * len(share.keys) // 2 : (half + 1) * len(share.keys) // 2]
                means.append(sum(losses[i] * lengths[i] for i in part) / sum(lengths[i] for i in part))
            mean = sum(w * m for w, m in zip(tokens.weights(2), means, strict=True)) / 2
            in_step = tokens.share(steps, sum(tokens.totals))
            found += mean * batch_weights.factor(replica) * in_step / (replicas * steps)
    assert found == pytest.approx(sum(losses[i] * lengths[i] for i in losses) / total)


def test_a_resumed_pass_counts_its_own_steps() -> None:
    batches = [TokenBatch([b], [b + 1]) for b in range(8)]
    share = next(shard_batches(batches, 1, 2, first=4))
    assert share.batch_weights is not None
    assert share.batch_weights.tokens is not None
    assert (share.batch_weights.tokens.number, share.batch_weights.tokens.totals) == (0, (5 + 6, 7 + 8))
