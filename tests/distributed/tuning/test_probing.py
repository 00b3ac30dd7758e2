"""Memory probes: every rank finds its limit alone, the ranks agree, and training is as if there had been no probe."""

from __future__ import annotations

import itertools
import math
import re
from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.distributed.tuning import probing_jobs as jobs
from tests.harness import RankError, RankGroup
from tests.pairwise import quick, slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 accumulating": {"accumulate": 2},
    "fsdp2": {},
    "fsdp2 accumulating": {"accumulate": 2},
    "tp2": {},
    "ep2": {},
    "pp2": {"microbatches": 4},
    "pp2 accumulating": {"microbatches": 2, "accumulate": 2},
    "pp2 GPipe": {"microbatches": 4, "schedule": "GPipe"},
    "fsdp2-pp2": {"microbatches": 4},
}
QUICK = ("pp2",)
EVERY = list(range(1, 301))
POWERS = [1, 2, 4, 8, 16, 32, 64, 128]
_WITHOUT: dict[str, list[dict[str, Any]]] = {}


def call(request: pytest.FixtureRequest, case: str, ladder: list[int], **options: Any) -> list[dict[str, Any]]:
    layout = case.split()[0]
    ranks: RankGroup = request.getfixturevalue("ranks4" if "-" in layout else "ranks2")
    return ranks.call(jobs.probe, layout, ladder, **LAYOUTS[case], **options)


def without_probe(request: pytest.FixtureRequest, case: str) -> list[dict[str, Any]]:
    """A run without a probe, made once."""
    if case not in _WITHOUT:
        _WITHOUT[case] = call(request, case, [])
    return _WITHOUT[case]


def limits(case: str) -> list[int]:
    return [300, 37] * (2 if "-" in case else 1)


def check_untouched(found: dict[str, Any], without: dict[str, Any]) -> None:
    """The steps after a probe are those of a run without one, bit for bit."""
    assert found["changed"] == []
    for key in ("losses", "seen", "metrics"):
        assert found[key] == without[key]
    assert len(found["gradients"]) == len(without["gradients"]) == 3
    for ours, expected in zip(found["gradients"], without["gradients"], strict=True):
        assert ours.keys() == expected.keys()
        assert [n for n in ours if not torch.equal(ours[n], expected[n])] == []


@pytest.mark.parametrize("case", quick(LAYOUTS, *QUICK))
def test_ranks_agree_on_the_smallest_limit_and_training_goes_on_untouched(
    request: pytest.FixtureRequest, case: str
) -> None:
    found = call(request, case, EVERY, faults={"limits": limits(case)})
    without = without_probe(request, case)
    for rank, (ours, expected) in enumerate(zip(found, without, strict=True)):
        (result,) = ours["results"]
        assert (result.size, result.limited_by, result.own_size) == (37, 1, limits(case)[rank])
        check_untouched(ours, expected)
        assert result.predicted_bytes == pytest.approx(result.measured_bytes, rel=0.02)


@pytest.mark.parametrize("case", quick(LAYOUTS, "fsdp2"))
def test_stays_within_the_budget_of_every_rank(request: pytest.FixtureRequest, case: str) -> None:
    measured = call(request, case, POWERS)
    peaks = [jobs.predicted(r["results"][0].fit, 100) for r in measured]
    budgets = [peaks[0], 2 * peaks[1], *(2 * p for p in peaks[2:])]
    for rank, found in enumerate(call(request, case, EVERY, budget_bytes=budgets)):
        (result,) = found["results"]
        assert result.limited_by == 0
        assert result.size == 100
        assert result.measured_bytes <= budgets[rank]
        assert result.predicted_bytes == pytest.approx(result.measured_bytes, rel=0.02)
        assert result.trials <= 3


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dp2", "fsdp2", "pp2"])
def test_repeated_probes_find_the_same(request: pytest.FixtureRequest, case: str) -> None:
    repeat_probes(request, case, 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", LAYOUTS)
def test_fifty_probes_find_the_same(request: pytest.FixtureRequest, case: str) -> None:
    repeat_probes(request, case, 50, timeout_seconds=500.0)


def repeat_probes(request: pytest.FixtureRequest, case: str, repeats: int, **options: Any) -> None:
    found = call(request, case, POWERS, faults={"limits": limits(case)}, repeats=repeats, **options)
    without = without_probe(request, case)
    for ours, expected in zip(found, without, strict=True):
        assert [r.size for r in ours["results"]] == [32] * repeats
        check_untouched(ours, expected)


@pytest.mark.parametrize(
    ("case", "place"),
    quick(
        itertools.product(
            ["dp2", "fsdp2", "fsdp2 accumulating", "tp2", "ep2", "pp2", "fsdp2-pp2"], ["forward", "backward"]
        ),
        ("pp2", "backward"),
    ),
)
def test_an_error_of_one_rank_reaches_all(request: pytest.FixtureRequest, case: str, place: str) -> None:
    failed = call(request, case, EVERY, faults={"fail_on": 1, "fail_in": place}, timeout_seconds=60.0)
    without = without_probe(request, case)
    for ours, expected in zip(failed, without, strict=True):
        (error,) = ours["errors"]
        # under `pp` it is the dry run of the microbatch that fails
        assert re.match(r"The memory probe has failed on rank 1: (Part.*)?KeyError: 'injected for ", error), error
        check_untouched(ours, expected)


@pytest.mark.parametrize("layout", quick(["ep2", "fsdp2", "tp2"], "ep2"))
def test_a_callback_derived_from_that_of_this_package_probes(ranks2: RankGroup, layout: str) -> None:
    assert ranks2.call(jobs.adapt_by_class_of_user, layout, [300, 37]) == [32, 32]


def test_timeouts_can_be_set_after_a_probe(ranks2: RankGroup) -> None:
    """The groups keep the probe's fake backends, on which torch's `ProcessGroup.set_timeout` fails."""
    timeout = timedelta(seconds=97)
    ranks2.call(jobs.probe, "dp2", POWERS)
    for timeouts in ranks2.call(jobs.timeouts_after_relayout, "dp2", "fsdp2", timeout):
        assert len(timeouts) > 5
        assert set(timeouts.values()) == {timeout}


def test_nothing_fits(ranks2: RankGroup) -> None:
    for ours in ranks2.call(jobs.probe, "dp2", [40, 80], faults={"limits": [300, 39]}):
        (error,) = ours["errors"]
        assert error.startswith("Not even a microbatch of 40 fits into the memory of rank 1. Use smaller ")
    for ours in ranks2.call(jobs.probe, "dp2", [4, 8], budget_bytes=[1000, 10**9]):
        (error,) = ours["errors"]
        assert "of 4 fits into the memory of rank 0, or its `budget_bytes`." in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatches": 2}, r"`microbatches` must be 1 without a pipeline.*Got 2 under `layout='dp2'`"),
        ({"budget_bytes": [0, 0]}, r"`budget_bytes` must be at least 1\. Got 0"),
    ],
)
def test_arguments(ranks2: RankGroup, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        ranks2.call(jobs.probe, "dp2", POWERS, **options)


@pytest.mark.parametrize(("layout", "microbatches"), [slow("dp2", 1), slow("fsdp2", 1), slow("pp2", 4)])
def test_one_rank_runs_out_of_real_memory(layout: str, microbatches: int) -> None:
    """The address space of rank 1 is limited, so that the allocator itself fails."""
    ladder, free = [64 * 2**i for i in range(9)], 150 * 2**20
    with RankGroup(2) as ranks:
        found = ranks.call(jobs.probe_under_limit, layout, ladder, 1, free, microbatches=microbatches)
        (first, losses, changed), (second, others, other_changed) = found
        assert first.size == second.size == second.own_size < first.own_size == ladder[-1]
        assert changed == other_changed == []
        assert second.measured_bytes < second.fit.predict(second.size * 2)
        assert second.fit.predict(second.size) - second.fit.predict(0) < free
        assert second.fit.predict(4 * second.size) - second.fit.predict(0) > free
        assert len(losses) == len(others) == 3
        assert all(map(math.isfinite, [*losses, *others]))


@pytest.mark.parametrize(
    ("layout", "microbatches"),
    [
        slow("dp2", 1),
        slow("fsdp2", 1),
        slow("pp2", 4),
    ],
)
def test_training_takes_the_memory_that_was_predicted(layout: str, microbatches: int) -> None:
    """Resident memory of a real run with the microbatch that was found, in processes that have done nothing else."""
    with RankGroup(2) as ranks:
        for result, weights, growth in ranks.call(jobs.resident_growth, layout, 200 * 2**20, microbatches):
            if result.size == result.own_size:
                assert result.predicted_bytes > 150 * 2**20
                assert growth == pytest.approx(result.predicted_bytes - weights, rel=0.1)
            assert result.predicted_bytes == pytest.approx(result.measured_bytes, rel=0.02)
