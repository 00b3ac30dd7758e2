"""What runs when, by the Trainer's options and methods, is that of one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.distributed.contract import flow_jobs as jobs
from tests.distributed.contract.layouts import TWO, assert_equal, assert_same_weights, call
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import in_turn, quick
from tests.support import refused

REFUSED = {("tp2", "detect_anomaly"): "cannot look for NaN in gradients that are divided.*Or use .*such as 'dp2'"}


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    return {name: reference(jobs.options, None, name) for name in jobs.OPTIONS}


@pytest.mark.feature(by="name", prefix="Trainer: ")
@pytest.mark.parametrize(
    ("layout", "name"),
    quick(itertools.product(TWO, jobs.OPTIONS), *in_turn(TWO, jobs.OPTIONS), ("dp2", "detect_anomaly"), *REFUSED),
)
def test_options(request: pytest.FixtureRequest, ranks2: RankGroup, one_process: dict, layout: str, name: str) -> None:
    if (layout, name) in REFUSED:
        with pytest.raises(RankError, match=REFUSED[layout, name]):
            ranks2.call(jobs.options, layout, name)
        refused(request)
        return
    results = ranks2.call(jobs.options, layout, name)
    assert_same_weights(results[0]["weights"], one_process[name]["weights"])
    for result in results:
        assert_equal(result["seen"], one_process[name]["seen"], name)
        # under `tp` and `pp` the loader is asked for once more, for a first batch to plan with
        assert result["asked"] == one_process[name]["asked"] + (layout != "dp2")


@pytest.mark.feature("fit, validate, test, predict, fit again")
@pytest.mark.parametrize("layout", quick([*TWO, "dp2-pp2", "fsdp2-tp2"], "fsdp2", "pp2"))
def test_fit_validate_test_predict_fit(request: pytest.FixtureRequest, layout: str) -> None:
    expected = reference(jobs.sequence, None)
    results = call(request, layout, jobs.sequence)
    assert_same_weights(results[0]["weights"], expected["weights"])
    for result in results:
        assert_equal(result["seen"], expected["seen"], layout)
    predicted = {i: row for result in results for i, row in result["predicted"].items()}
    assert_equal(jobs.as_numbers(predicted), jobs.as_numbers(expected["predicted"]))
