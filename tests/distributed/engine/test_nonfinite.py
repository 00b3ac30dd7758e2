"""A gradient or a loss that is not finite on one rank: no rank takes the step."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.distributed.engine import numbers_jobs as jobs
from tests.distributed.reference import reference
from tests.harness import RankGroup
from tests.pairwise import quick, slow

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a loss, dp": ("dp2", {"poison": "loss", "rank": 1}, r"rank 1 \(pipeline rank 0, replica 1\): the loss is nan"),
    "a loss alone": ("dp2", {"poison": "loss alone", "rank": 1}, r"rank 1 .*replica 1\): the loss is nan\. "),
    "a loss, pp": ("pp2", {"poison": "loss"}, r"the loss is nan"),
    "a gradient, dp": ("dp2", {"poison": "head.weight", "rank": 1}, r"rank 1 .*`head.weight` is NaN in 1 of 64 e"),
    "a gradient, fsdp": ("fsdp2", {"poison": "head.weight", "rank": 1}, r"rank 1 .*`head.weight` is NaN in 1 of 32 e"),
    "a gradient, tp": ("tp2", {"poison": "blocks.2.up.weight", "rank": 1}, r"rank 1 .*`blocks.2.up.weight` is NaN"),
    "a gradient, pp": (
        "pp2",
        {"poison": "stem.weight"},
        r"rank 0 \(pipeline rank 0, replica 0\): .*`stem.weight` is N",
    ),
    "a gradient, last stage": ("pp2", {"poison": "head.bias", "rank": 1}, r"rank 1 \(pipeline rank 1, .*`head.bias`"),
}


def assert_weights(result: dict, expected: dict) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)


def stopped(results: list[dict]) -> str:
    """The error that one rank shows; the others have ended quietly."""
    shown = [r["error"] for r in results if r["error"].startswith("NonFiniteError: ")]
    assert len(shown) == 1
    assert all(r["error"].startswith("RankFailed: ") for r in results if r["error"] not in shown)
    return shown[0]


OFTEN = ["a loss, dp", "a gradient, tp", "a gradient, last stage"]
"""An error ends the ranks, and new ones have to connect: the other cases run with the slow tests."""


@pytest.mark.parametrize("case", quick(CASES, *OFTEN))
def test_all_ranks_stop_before_the_update(ranks2: RankGroup, case):
    layout, options, message = CASES[case]
    results = ranks2.call(jobs.poisoned, layout, None, options)
    assert "NonFiniteError: At global step 1, gradients or the loss are not finite: " in stopped(results)
    assert re.search(message, stopped(results)), stopped(results)
    assert [r["steps"] for r in results] == [1, 1]
    assert_weights(results[0], reference(jobs.poisoned, None, None, {}, max_steps=1))


@pytest.mark.feature("`on_nonfinite`: NaN on one rank stops all ranks, or skips the step")
@pytest.mark.parametrize(("case", "layout"), [(case, layout) for case, (layout, _, _) in CASES.items()])
def test_all_ranks_leave_the_step_out(ranks2: RankGroup, case, layout):
    _, options, message = CASES[case]
    results = ranks2.call(jobs.poisoned, layout, "skip", options)
    expected = reference(jobs.poisoned, None, None, {"leave_out": True})
    assert [r["error"] for r in results] == [None, None]
    assert_weights(results[0], expected)
    assert results[0]["steps"] == expected["steps"] == 3
    assert results[0]["skipped"] == [1.0]
    assert len(results[0]["warned"]) == 1
    assert re.search(message + ".*The step is left out, 1 so far", results[0]["warned"][0])
    assert results[1]["warned"] == []


def test_a_product_of_axes(ranks4: RankGroup):
    results = ranks4.call(jobs.poisoned, "tp2-pp2", None, {"poison": "blocks.3.down.weight", "rank": 3})
    assert re.search(r"rank 3 \(pipeline rank 1, replica 0\): .*`blocks.3.down.weight`", stopped(results))


def test_a_loss_of_an_accumulated_batch(ranks2: RankGroup):
    options = {"poison": "loss", "rank": 1, "step": 0}
    results = ranks2.call(jobs.poisoned, "dp2", None, options, accumulate_grad_batches=3)
    assert re.search("At global step 0, .*rank 1 .*the loss is nan", stopped(results))


@pytest.mark.parametrize("layout", [slow("dp2"), slow("fsdp2"), "tp2"])
def test_optimizers_that_are_stepped_by_hand(ranks2: RankGroup, layout):
    options = {"poison": "head.weight", "rank": 1, "manual": True}
    results = ranks2.call(jobs.poisoned, layout, None, options)
    assert re.search("rank 1 .*`head.weight`", stopped(results))
    skipped = ranks2.call(jobs.poisoned, layout, "skip", options)[0]
    assert skipped["error"] is None
    assert all(torch.isfinite(w).all() for w in skipped["weights"].values())


def test_other_words_are_refused():
    from lightning_hybrid import HybridStrategy

    wrong: Any = "ignore"
    with pytest.raises(ValueError, match="`on_nonfinite` must be 'raise' or 'skip'. Got 'ignore'"):
        HybridStrategy(on_nonfinite=wrong)
