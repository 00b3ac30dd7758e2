"""Dropout draws the same masks wherever a model is cut, equal ones on `tp` peers, other ones on other replicas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.distributed.engine import numbers_jobs as jobs
from tests.harness import RankGroup
from tests.pairwise import quick

ONE_MICROBATCH: dict[str, Any] = {"strategy_options": {"microbatches": 1}}
OUTSIDE = {"outside": 0.3}
BOTH = {"inside": 0.3, "outside": 0.3}


@pytest.fixture(scope="module")
def ranks1() -> Iterator[RankGroup]:
    with RankGroup(1) as group:
        yield group


def assert_same(result: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert result["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=tolerance, atol=1e-6, msg=name)


def losses_without_dropout(group: RankGroup, layout: str) -> list[float]:
    return group.call(jobs.dropout, layout, {})[0]["losses"]


@pytest.fixture(scope="module")
def one(ranks1: RankGroup) -> dict[str, dict]:
    return {
        "outside": ranks1.call(jobs.dropout, "dp1", OUTSIDE)[0],
        "both": ranks1.call(jobs.dropout, "dp1", BOTH)[0],
        "none": ranks1.call(jobs.dropout, "dp1", {})[0],
    }


@pytest.mark.feature("dropout: a second run draws the same masks")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "tp2", "pp2"))
def test_a_second_run_draws_the_same(ranks2: RankGroup, layout):
    first, second = (ranks2.call(jobs.dropout, layout, BOTH) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a["losses"] == b["losses"]
        assert a["masks"] == b["masks"]
        assert all(torch.equal(value, b["weights"][name]) for name, value in a["weights"].items())


def test_a_pipeline_draws_what_one_process_draws(ranks2: RankGroup, one):
    results = ranks2.call(jobs.dropout, "pp2", BOTH, **ONE_MICROBATCH)
    assert_same(results[0], one["both"])
    assert one["both"]["losses"] != pytest.approx(one["none"]["losses"], rel=1e-2), "dropout does something"
    masks = [result["masks"] for result in results]
    steps = len(one["both"]["losses"])
    by_step = [masks[0][2 * s : 2 * s + 2] + masks[1][2 * s : 2 * s + 2] for s in range(steps)]
    assert sum(by_step, []) == one["both"]["masks"]


def test_dropout_of_whole_values_under_tp_is_that_of_one_process(ranks2: RankGroup, one):
    assert_same(ranks2.call(jobs.dropout, "tp2", OUTSIDE)[0], one["outside"])


def test_tp_peers_agree_on_whole_values_and_differ_in_regions(ranks2: RankGroup):
    a, b = ranks2.call(jobs.dropout, "tp2", BOTH)
    assert a["masks"] == b["masks"]
    assert len(set(a["masks"])) == len(a["masks"])
    assert not set(a["inner"]) & set(b["inner"])
    assert len(set(a["inner"])) == len(a["inner"])
    assert a["in_step"] == b["in_step"], "the common RNG state is that of the peer"
    assert a["losses"] == b["losses"]


def test_replicas_draw_different_masks_and_the_same_under_dp_and_fsdp(ranks2: RankGroup):
    dp, fsdp = ranks2.call(jobs.dropout, "dp2", BOTH), ranks2.call(jobs.dropout, "fsdp2", BOTH)
    assert not set(dp[0]["masks"]) & set(dp[1]["masks"])
    assert [r["masks"] for r in dp] == [r["masks"] for r in fsdp]
    assert_same(fsdp[0], dp[0])


@pytest.mark.parametrize("layout", quick(["dp2-pp2", "fsdp2-pp2"], "dp2-pp2"))
def test_replicas_of_pipelines_draw_what_replicas_of_processes_draw(ranks2: RankGroup, ranks4: RankGroup, layout):
    expected = ranks2.call(jobs.dropout, "dp2", BOTH)[0]
    assert_same(ranks4.call(jobs.dropout, layout, BOTH, **ONE_MICROBATCH)[0], expected)


@pytest.mark.feature("dropout: the same masks with activation checkpointing")
@pytest.mark.parametrize(
    ("layout", "recompute"),
    quick(
        itertools.product(["dp2", "fsdp2", "tp2", "pp2"], ["block", "block, reentrant", "part"]),
        ("dp2", "block, reentrant"),
        ("fsdp2", "block"),
        ("tp2", "part"),
        ("pp2", "block, reentrant"),
    ),
)
def test_what_is_recomputed_draws_the_same_again(ranks2: RankGroup, layout, recompute):
    kept = ranks2.call(jobs.dropout, layout, BOTH)[0]
    assert_same(ranks2.call(jobs.dropout, layout, {**BOTH, "recompute": recompute})[0], kept)


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_steps_leave_the_shared_streams_alone(ranks2: RankGroup, layout):
    results = ranks2.call(jobs.dropout, layout, BOTH)
    states = {state for result in results for state in result["shared"]}
    assert len(states) == 1, "all steps of all ranks"


def test_microbatches_and_accumulated_batches_draw_different_masks(ranks2: RankGroup):
    a, _ = ranks2.call(
        jobs.dropout, "pp2", BOTH, strategy_options={"microbatches": 2}, accumulate_grad_batches=3, samples=48
    )
    assert len(set(a["masks"])) == len(a["masks"]) == 2 * 2 * 3


def test_evaluation_draws_from_its_own_streams(ranks2: RankGroup, one):
    assert ranks2.call(jobs.dropout, "pp2", OUTSIDE, **ONE_MICROBATCH)[0]["noise"] == pytest.approx(
        one["outside"]["noise"], rel=1e-6
    )


def test_a_resumed_run_goes_on_with_the_masks_of_the_uninterrupted_one(ranks2: RankGroup, tmp_path):
    whole = ranks2.call(jobs.dropout, "pp2", BOTH, max_epochs=2)
    path = str(tmp_path / "half.ckpt")
    ranks2.call(jobs.dropout, "pp2", BOTH, save=path)
    resumed = ranks2.call(jobs.dropout, "pp2", BOTH, ckpt_path=path, max_epochs=2, seed=8)
    half = len(whole[0]["masks"]) // 2
    assert resumed[0]["masks"] == whole[0]["masks"][half:]
    assert_same({**resumed[0], "losses": []}, {**whole[0], "losses": []})
