"""The layout changes while training goes on: as if it had not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import relayout_jobs as jobs
from tests.harness import RankGroup

pytestmark = pytest.mark.distributed

FEATURE = "`strategy.relayout(...)`"


@pytest.fixture(scope="module")
def plain(ranks4: RankGroup) -> dict[str, Any]:
    """A run that stays in one layout."""
    return ranks4.call(jobs.train, "dp4")[0]


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["changed"] == [], "weights and optimizer state are bit-equal right after a move"
    assert found["objects"] == 1, "the module and its optimizers are the same objects"
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=1e-6)
    assert found["rates"] == expected["rates"]
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 10))])
def test_random_layouts_are_one_run(ranks4: RankGroup, plain: dict[str, Any], seed: int) -> None:
    layouts = jobs.random_layouts(seed, 30)
    found = ranks4.call(jobs.train, "dp4", layouts)[0]
    assert len(found["moved"]) == 6
    check(found, plain)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_experts_move(ranks4: RankGroup, seed: int) -> None:
    layouts = jobs.random_layouts(seed, 30, experts=True)
    assert any("ep" in layout for layout in layouts.values())
    expected = ranks4.call(jobs.train, "dp4", kind="Mixture")[0]
    found = ranks4.call(jobs.train, "dp4", layouts, kind="Mixture")[0]
    check(found, expected)
