"""Loaders without a sampler: sharded here or by the user, never read twice, never a hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.dataloader import stream_jobs
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import quick, slow

TWO = ["dp2", "fsdp2", "tp2", "pp2"]


def assert_trained(result: dict, expected: dict) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=2e-5, atol=2e-6, msg=name)
    for key, value in expected["metrics"].items():
        assert result["metrics"][key] == pytest.approx(value, rel=2e-5), key


@pytest.mark.feature("data: `IterableDataset`, sharded round-robin")
@pytest.mark.parametrize("samples", [37, slow(33)])
@pytest.mark.parametrize("layout", quick(TWO, "dp2", "pp2"))
def test_a_stream_that_the_user_does_not_shard_is_sharded(ranks2: RankGroup, layout, samples):
    expected = reference(stream_jobs.train_on_stream, None, samples=samples)
    results = ranks2.call(stream_jobs.train_on_stream, layout, samples=samples)
    assert_trained(results[0], expected)
    assert results[0]["metrics"] == results[1]["metrics"]


CASES: dict[str, dict[str, Any]] = {
    "fewer samples than replicas": {"samples": 1},
    "drop last": {"kind": "drop last"},
    "with a length": {"kind": "list", "samples": 64},
    "can be read once": {"kind": "once", "max_epochs": 1},
    "limited": {"limit_train_batches": 2},
    "in two workers": {"workers": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_other_streams(ranks2: RankGroup, case):
    options = CASES[case]
    expected = reference(stream_jobs.train_on_stream, None, **options)
    assert_trained(ranks2.call(stream_jobs.train_on_stream, "dp2", **options)[0], expected)


@pytest.mark.slow
def test_four_ranks(ranks4: RankGroup):
    expected = reference(stream_jobs.train_on_stream, None)
    assert_trained(ranks4.call(stream_jobs.train_on_stream, "fsdp2-pp2")[0], expected)


@pytest.mark.feature("data: `IterableDataset`, sharded by the user")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "dp2"))
def test_a_stream_that_the_user_shards_is_left_alone(ranks2: RankGroup, layout):
    expected = reference(stream_jobs.train_on_stream, None, samples=64)
    results = ranks2.call(stream_jobs.train_on_stream, layout, "by replica", samples=64)
    assert_trained(results[0], expected)
    seen = [i for result in results for step in result["steps"] for i in step]
    assert sorted(seen) == sorted([*range(64), *range(64)])


@pytest.mark.parametrize("layout", quick(["tp2", "pp2"], "tp2"))
def test_sharding_by_rank_is_refused_where_ranks_share_data(ranks2: RankGroup, layout):
    with pytest.raises(RankError, match=r"the ranks 0, 1 of one replica must read the same data.*distributed_sampler"):
        ranks2.call(stream_jobs.train_on_stream, layout, "by rank")


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "dp2"))
def test_shards_of_different_lengths_stop_together(ranks2: RankGroup, layout):
    """48 samples in two shards: 32 and 16, in batches of 8."""
    results = ranks2.call(stream_jobs.train_on_stream, layout, "uneven shards", samples=48, max_epochs=1)
    assert [len(result["steps"]) for result in results] == [2, 2]
    text = "replica 1 ended after 2, others have at least 3"
    assert any(text in warning for warning in results[0]["warned"])


def test_a_distributed_sampler_of_the_user_is_left_alone(ranks2: RankGroup):
    results = ranks2.call(stream_jobs.train_left_alone, "dp2", "distributed sampler")
    assert sorted(i for result in results for step in result for i in step) == list(range(32))
    with pytest.raises(RankError, match="must read the same data"):
        ranks2.call(stream_jobs.train_left_alone, "tp2", "distributed sampler")


def test_without_splitting_every_replica_reads_everything(ranks2: RankGroup):
    for result in ranks2.call(stream_jobs.train_left_alone, "dp2", "not split"):
        assert [i for step in result for i in step] == list(range(32))
