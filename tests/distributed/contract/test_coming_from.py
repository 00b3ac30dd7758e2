"""Programs of other libraries and their counterparts with `HybridStrategy` have the same losses, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.contract import coming_from_jobs as jobs
from tests.harness import RankGroup
from tests.pairwise import slow


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankGroup]:
    """Two ranks that no other test uses: other libraries keep state of a process."""
    with RankGroup(2) as group:
        yield group


@pytest.mark.parametrize(
    ("before", "layout"), [slow(jobs.lightning_ddp, "dp2"), (jobs.torch_ddp, "dp2"), slow(jobs.torch_fsdp, "fsdp2")]
)
def test_programs_of_torch_and_lightning(ranks: RankGroup, before: Any, layout: str) -> None:
    _equal(ranks.call(before), ranks.call(jobs.hybrid, layout))


@pytest.mark.slow
def test_a_plan_by_hand_is_not_needed(ranks: RankGroup) -> None:
    _equal(ranks.call(jobs.lightning_model_parallel), ranks.call(jobs.hybrid, "tp2", clips=False))


@pytest.mark.slow
def test_lightning_shuffles_a_loader_that_does_not(ranks: RankGroup) -> None:
    before, after = ranks.call(jobs.order, False), ranks.call(jobs.order, True)
    assert after == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert before != after


@pytest.mark.slow
def test_a_program_of_accelerate(ranks: RankGroup, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="not installed: `pip install accelerate==1.15.0`")
    _equal(ranks.call(jobs.accelerate_loop, str(tmp_path)), ranks.call(jobs.hybrid, "dp2"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "layout"), [(1, "dp2"), (3, "fsdp2")])
def test_a_program_of_deepspeed(ranks: RankGroup, stage: int, layout: str) -> None:
    pytest.importorskip("deepspeed", reason="not installed: `pip install deepspeed==0.19.8`")
    _equal(ranks.call(jobs.deepspeed_loop, stage, timeout_seconds=150), ranks.call(jobs.hybrid, layout))


def _equal(before: list[list[float]], after: list[list[float]]) -> None:
    """Shows that every rank of both programs has seen the same losses, which are those of training."""
    expected = after[0]
    assert len(expected) == jobs.SAMPLES // jobs.BATCH // jobs.ACCUMULATE
    assert max(expected) > min(expected) + 1e-3
    for losses in (*before, *after):
        assert losses == pytest.approx(expected, rel=1e-5)
