"""Lightning's callbacks decide and show on every rank what they do in one process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.contract import callbacks_jobs as jobs
from tests.distributed.contract.layouts import FOUR, TWO, assert_equal, assert_same_weights, call
from tests.distributed.reference import reference
from tests.harness import RankGroup
from tests.pairwise import quick


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return jobs.decisions(None, str(tmp_path_factory.mktemp("one")))


@pytest.mark.feature(
    "`ModelCheckpoint`, `EarlyStopping` and `ReduceLROnPlateau` by a metric",
    "`LearningRateMonitor`, `GradientAccumulationScheduler`, `Timer`",
)
@pytest.mark.parametrize("layout", quick([*TWO, *FOUR], "pp2"))
def test_decisions(request: pytest.FixtureRequest, one_process: dict, tmp_path: Path, layout: str) -> None:
    assert one_process["stopped"] == [4, 9, 3]
    assert len(one_process["files"]) == 3
    for result in call(request, layout, jobs.decisions, str(tmp_path)):
        assert_equal(result, one_process, layout)


KINDS = [
    "StochasticWeightAveraging",
    "EMAWeightAveraging",
    "by a function of lists",
    "WeightAveraging",
    "by a function",
]
AVERAGED = [
    ("fsdp2", "EMAWeightAveraging"),
    ("tp2", "StochasticWeightAveraging"),
    ("pp2", "by a function of lists"),
]


@pytest.mark.feature(by="kind", prefix="weight averaging: ")
@pytest.mark.parametrize(("layout", "kind"), quick(itertools.product([*TWO, *FOUR], KINDS), *AVERAGED))
def test_averages(request: pytest.FixtureRequest, tmp_path: Path, layout: str, kind: str) -> None:
    expected = jobs.averaged(None, kind, str(tmp_path))
    results = call(request, layout, jobs.averaged, kind, str(tmp_path))
    assert_same_weights(results[0]["weights"], expected["weights"])
    for result in results:
        assert_equal(result["metrics"], expected["metrics"])


@pytest.mark.parametrize(
    ("layouts", "kind"),
    quick(
        itertools.product(
            ["fsdp2 then pp2", "pp2 then tp2", "tp2 then dp2"], ["StochasticWeightAveraging", "by a function of lists"]
        ),
        ("pp2 then tp2", "by a function of lists"),
    ),
)
def test_averages_go_on_under_another_layout(ranks2: RankGroup, tmp_path: Path, layouts: str, kind: str) -> None:
    expected = jobs.averaged(None, kind, str(tmp_path))
    results = ranks2.call(jobs.averaged, layouts, kind, str(tmp_path), resumed=True)
    assert_same_weights(results[0]["weights"], expected["weights"])


@pytest.mark.feature("`BackboneFinetuning`: freezing and unfreezing")
@pytest.mark.parametrize("layout", quick([*TWO, *FOUR], "pp2"))
def test_fine_tuning(request: pytest.FixtureRequest, layout: str) -> None:
    expected = reference(jobs.fine_tuned, None)
    results = call(request, layout, jobs.fine_tuned)
    assert_same_weights(results[0]["weights"], expected["weights"])
    for result in results:
        assert [rate for _, rate in result["groups"]] == [rate for _, rate in expected["groups"]]


def test_a_copy_of_a_partitioned_module_can_be_run_after_the_run(ranks2: RankGroup) -> None:
    assert ranks2.call(jobs.copied, "fsdp2") == ["no error"] * 2


@pytest.mark.feature("progress bars, `ModelSummary`, `DeviceStatsMonitor`")
@pytest.mark.parametrize(
    ("layout", "bar"),
    quick(itertools.product([*TWO, *FOUR], ["tqdm", "rich"]), ("tp2", "tqdm"), ("pp2", "rich")),
)
def test_progress_bars_summary_and_device_stats(request: pytest.FixtureRequest, layout: str, bar: str) -> None:
    expected = reference(jobs.shown, None, bar)
    assert expected["stats"]
    for rank, result in enumerate(call(request, layout, jobs.shown, bar)):
        assert_equal(result, {**expected, "enabled": rank == 0}, layout)
