"""What is logged, and what callbacks are given after a batch, is that of one process on every rank."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_hybrid import Layout
from tests.distributed.contract import jobs
from tests.distributed.contract.layouts import FOUR, TWO, assert_equal, call
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

ALL = [*TWO, *FOUR, "pp2 ZBVZeroBubble"]
"""The last one with a schedule that puts the first and the last stage on one rank."""


@pytest.fixture(scope="module")
def one_process() -> dict:
    return reference(jobs.logs, None)


@pytest.fixture(scope="module")
def metrics_of_one_process() -> dict:
    return reference(jobs.metrics, None)


@pytest.mark.feature(
    "`self.log` on steps and epochs, in the progress bar, from any stage, with `batch_size` and `reduce_fx`",
    "`self.log` in hooks, `self.log_dict`, several validation loaders",
    "`training_step` that returns a dictionary",
)
@pytest.mark.parametrize("layout", quick(ALL, "dp2", "pp2"))
def test_logs(request: pytest.FixtureRequest, one_process: dict, layout: str) -> None:
    results = call(request, layout, jobs.logs)
    for rank, result in enumerate(results):
        for key in ("lines", "bars", "metrics"):
            assert_equal(result[key], one_process[key] if rank == 0 else _without(one_process[key], "guarded"), key)
    _assert_outputs(layout, [r["outputs"] for r in results], one_process["outputs"])


def _without(lines: Any, key: str) -> Any:
    """Lines of a logger, or metrics, as they are on a rank that does not log `key`."""
    if isinstance(lines, dict):
        return {k: v for k, v in lines.items() if not k.startswith(key)}
    return [_without(x, key) if isinstance(x, dict | list | tuple) else x for x in lines]


def _assert_outputs(layout: str, by_rank: list[list[dict]], expected: list[dict]) -> None:
    """Each rank is given what its replica made: the rows of every n-th sample, and means over them."""
    parsed = Layout.parse(layout.split()[0])
    replicas = [by_rank[r * parsed.tp] for r in range(parsed.replicas)]
    for rank, outputs in enumerate(by_rank):
        assert_equal(outputs, replicas[rank // parsed.tp % parsed.replicas], f"rank {rank}")
    for batch, whole in enumerate(expected):
        parts = [outputs[batch] for outputs in replicas]
        for r, part in enumerate(parts):
            assert list(part) == list(whole)
            assert part["index"] == whole["index"][r :: len(parts)]
            assert part["note"] == "same"
        for key in ("loss", "confidence"):
            assert sum(p[key] for p in parts) / len(parts) == pytest.approx(whole[key], rel=1e-5), key


@pytest.mark.feature("torchmetrics: logged, computed, collections, lists as states, in callbacks")
@pytest.mark.parametrize("layout", quick(ALL, "fsdp2", "pp2"))
def test_metrics(request: pytest.FixtureRequest, metrics_of_one_process: dict, layout: str) -> None:
    for result in call(request, layout, jobs.metrics):
        for key in ("by hand", "callback", "lines"):
            assert_equal(result[key], metrics_of_one_process[key], key)


@pytest.mark.parametrize("layout", ["dp2", "fsdp2"])
def test_keys_of_one_replica_only_are_refused(ranks2: RankGroup, layout: str) -> None:
    with pytest.raises(
        RankError, match=r"`self.log` must be called with the same keys.*Got \[\[.*even.*Log a key on all"
    ):
        ranks2.call(jobs.different_keys, layout)


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_reductions_that_lightning_refuses_are_refused(ranks2: RankGroup, layout: str) -> None:
    with pytest.raises(RankError, match=r"`self.log\('median', reduce_fx=...\)` takes only min, max, mean and sum"):
        ranks2.call(jobs.reduce_by, layout)


def test_a_metric_of_two_stages_is_refused(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"the metric `size` is updated on stages of the pipeline ranks 0 and 1"):
        ranks2.call(jobs.two_owners, "pp2")
