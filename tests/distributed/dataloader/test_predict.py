"""Predictions: the batches of one process, complete and in order on every rank, and what writers are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.dataloader import stream_jobs
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import pairwise

TWO = ["dp2", "fsdp2", "tp2", "pp2"]

CASES: dict[str, dict[str, Any]] = {
    "three batches for two replicas": {"counts": (10,)},
    "one batch": {"counts": (3,)},
    "two loaders": {"counts": (21, 10)},
    "limited to three batches": {"counts": (21,), "limit_predict_batches": 3},
    "limited to half of the batches": {"counts": (21,), "limit_predict_batches": 0.5},
    "without a batch size, one sample at a time": {"counts": (5,), "size": None},
}
LIMITED = ("limited to three batches", "limited to half of the batches")


def assert_predicted(found: Any, expected: Any) -> None:
    if isinstance(expected[0], list):
        assert len(found) == len(expected)
        for of_loader, wanted in zip(found, expected, strict=True):
            assert_predicted(of_loader, wanted)
        return
    assert len(found) == len(expected)
    for batch, wanted in zip(found, expected, strict=True):
        assert torch.equal(torch.as_tensor(batch["index"]), torch.as_tensor(wanted["index"]))
        torch.testing.assert_close(batch["logits"], wanted["logits"], rtol=1e-5, atol=1e-6)
        assert (batch["batch"], batch["loader"]) == (wanted["batch"], wanted["loader"])


@pytest.mark.feature(by="case", prefix="predictions: ")
@pytest.mark.parametrize(
    ("layout", "case"),
    # a sample without a batch has no dimension to split, and the stack is planned with one
    [
        pytest.param(layout, case, marks=[pytest.mark.slow] if layout != "dp2" and case in LIMITED else [])
        for layout in TWO
        for case in CASES
        if "size" not in CASES[case] or layout in ("dp2", "fsdp2")
    ],
)
def test_every_rank_has_all_predictions_in_order(ranks2: RankGroup, layout, case):
    expected, _, _ = reference(stream_jobs.predict, None, **CASES[case])
    for found, _, _ in ranks2.call(stream_jobs.predict, layout, **CASES[case]):
        assert_predicted(found, expected)


@pytest.mark.feature("predictions: two loaders")
@pytest.mark.parametrize("layout", ["fsdp2-pp2", pytest.param("dp2-tp2", marks=pytest.mark.slow)])
def test_four_ranks(ranks4: RankGroup, layout):
    expected, _, _ = reference(stream_jobs.predict, None, counts=(21, 10))
    for found, _, _ in ranks4.call(stream_jobs.predict, layout, counts=(21, 10)):
        assert_predicted(found, expected)


def test_fewer_batches_than_replicas(ranks4: RankGroup):
    expected, _, _ = reference(stream_jobs.predict, None, counts=(6,))
    results = ranks4.call(stream_jobs.predict, "fsdp4", counts=(6,))
    for found, _, _ in results:
        assert_predicted(found, expected)
    assert [len(batches) for _, batches, _ in results] == [1, 1, 0, 0], "nothing is written for what is not wanted"


@pytest.mark.parametrize("layout", ["dp2", "fsdp2"])
def test_writers_get_the_own_batches_of_a_rank_with_their_indices(ranks2: RankGroup, layout):
    _, expected, (lengths, indices) = reference(stream_jobs.predict, None, counts=(21, 10))
    results = ranks2.call(stream_jobs.predict, layout, counts=(21, 10))
    for rank, (_, batches, epoch) in enumerate(results):
        of_loader = [[b for b in expected if b[0] == loader][rank::2] for loader in range(2)]
        assert batches == [*of_loader[0], *of_loader[1]]
        assert all(indices == predicted for _, indices, predicted in batches)
        assert epoch[0] == [len(b) for b in of_loader]
        assert epoch[1] == [loader[rank::2] for loader in indices]
        assert all(type(batch) is list for loader in epoch[1] for batch in loader)


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_nothing_is_gathered_that_is_not_returned(ranks2: RankGroup, layout):
    for found, batches, _ in ranks2.call(stream_jobs.predict, layout, return_predictions=False):
        assert found is None
        assert batches


@pytest.mark.feature("predictions: iterable dataset")
@pytest.mark.parametrize(("layout", "sized", "limit"), pairwise(["fsdp2", "tp2"], [False, True], [None, 3]))
def test_a_stream(ranks2: RankGroup, layout, sized, limit):
    expected = reference(stream_jobs.predict_on_stream, None, 19, sized, limit=limit)
    for found in ranks2.call(stream_jobs.predict_on_stream, layout, 19, sized, limit=limit):
        assert_predicted(found, expected)


def test_a_stream_beside_other_loaders_is_refused(ranks2: RankGroup):
    with pytest.raises(RankError, match=r"2 loaders are predicted on.*Call `trainer\.predict` once for each loader"):
        ranks2.call(stream_jobs.predict_on_stream, "dp2", 19, False, 2)
