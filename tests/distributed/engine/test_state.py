"""State that a step changes is that of one process on every rank of a pipeline: in the step, in hooks, afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.engine.state_jobs import MODULES, REFUSED, fit
from tests.harness import RankError, RankGroup
from tests.pairwise import quick


def same(found: Any, expected: Any) -> None:
    """Compares nested lists of numbers."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    else:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.feature("state that the step changes")
@pytest.mark.parametrize("layout", ["pp2"])
@pytest.mark.parametrize("kind", quick([kind for kind in MODULES if kind not in REFUSED], "Kept"))
def test_every_rank_has_the_state_of_one_process(ranks2: RankGroup, layout: str, kind: str) -> None:
    compare(fit(None, kind), ranks2.call(fit, layout, kind))


def compare(expected: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Compares what each rank has with one process."""
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for result in found:
        same(result["report"], expected["report"])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("kind", ["Kept", "Queue", "Hidden", "InBlocks"])
def test_several_stages_of_a_rank_change_state_once(ranks2: RankGroup, kind: str, schedule: str) -> None:
    compare(fit(None, kind), ranks2.call(fit, "pp2", kind, schedule=schedule))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2-pp2", "tp2-pp2"])
def test_products_with_other_axes(ranks4: RankGroup, layout: str) -> None:
    kind = "Hidden" if layout == "tp2-pp2" else "Counter"
    compare(fit(None, kind), ranks4.call(fit, layout, kind))


@pytest.mark.feature("state that the step changes")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "dp2"))
def test_replicas_have_equal_buffers_or_are_refused(ranks2: RankGroup, layout: str) -> None:
    compare(fit(None, "GatheredCenter"), ranks2.call(fit, layout, "GatheredCenter"))
    with pytest.raises(RankError, match=r"state_jobs.py:\d+ \(training_step\)\) computes the buffer `center`"):
        ranks2.call(fit, layout, "Center")


@pytest.mark.slow
def test_a_given_number_of_microbatches_is_refused_with_the_line(ranks2: RankGroup) -> None:
    with pytest.raises(
        RankError, match=r"state_jobs.py:\d+ \(training_step\) changes `seen`, once for the whole batch"
    ):
        ranks2.call(fit, "pp2", "Counter", microbatches=2)


def test_state_that_changes_only_later_ends_the_run(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="The step has changed `kept`"):
        ranks2.call(fit, "pp2", "Later")
