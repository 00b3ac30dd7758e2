"""Every precision gives what one process gives in it, as closely as one process agrees with itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.distributed.engine import numbers_jobs as jobs
from tests.distributed.reference import reference
from tests.harness import RankGroup
from tests.pairwise import in_turn, quick, slow

TWO = ["dp2", "fsdp2", "tp2", "pp2"]
HALF = ["bf16-mixed", "bf16-true", "16-mixed", "16-true"]
PRECISIONS = ["32-true", *HALF, "64-true"]
TIMES_RERUN = 4
"""How many times as far from one process a layout may be as one process is that adds the same gradients in 4 parts."""
TIMES_LARGEST = 10
"""The same for the weight that is farthest: a single wrong one must show."""


def distance(a: dict, b: dict) -> tuple[float, float, float]:
    """Largest difference of losses, and root mean square and largest of those of weights."""
    losses = max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))
    weights = torch.cat([(a["weights"][n] - w).flatten() for n, w in b["weights"].items()])
    return losses, float(weights.square().mean().sqrt()), float(weights.abs().max())


@pytest.fixture(scope="module")
def one() -> dict[str, dict]:
    return {precision: reference(jobs.precise, None, precision) for precision in ["32-true", *HALF, "64-true"]}


@pytest.fixture(scope="module")
def bounds(one) -> dict[str, tuple[float, float, float]]:
    found = {}
    for precision, expected in one.items():
        rerun = jobs.precise(None, precision, batch=4, accumulate_grad_batches=4)
        rerun["losses"] = [sum(rerun["losses"][i : i + 4]) / 4 for i in range(0, len(rerun["losses"]), 4)]
        losses, weights, largest = distance(rerun, expected)
        found[precision] = TIMES_RERUN * losses, TIMES_RERUN * weights, TIMES_LARGEST * largest
    # what is logged is single precision
    found["32-true"] = 2e-6, 1e-6, found["32-true"][2]
    found["64-true"] = 1e-6, 1e-12, found["64-true"][2]
    return found


def check(result: dict, expected: dict, bound: tuple[float, float, float]) -> None:
    losses, weights, largest = distance(result, expected)
    assert losses <= bound[0], f"losses differ by {losses:.1e}, more than {bound[0]:.1e}"
    assert weights <= bound[1], f"weights differ by {weights:.1e}, more than {bound[1]:.1e}"
    assert largest <= bound[2], f"a weight differs by {largest:.1e}, more than {bound[2]:.1e}"
    for key in ("dtypes", "gradients", "optimizer", "scale"):
        assert result[key] == expected[key], key


@pytest.mark.feature(by="precision", prefix="precision: ")
@pytest.mark.parametrize(("precision", "layout"), quick(itertools.product(PRECISIONS, TWO), *in_turn(PRECISIONS, TWO)))
def test_two_ranks(ranks2: RankGroup, one, bounds, layout, precision):
    check(ranks2.call(jobs.precise, layout, precision)[0], one[precision], bounds[precision])


@pytest.mark.feature(by="precision", prefix="precision: ")
@pytest.mark.parametrize("precision", ["16-mixed", slow("bf16-mixed"), slow("64-true")])
@pytest.mark.parametrize("layout", ["fsdp2-tp2", slow("tp2-pp2")])
def test_four_ranks(ranks4: RankGroup, one, bounds, layout, precision):
    check(ranks4.call(jobs.precise, layout, precision)[0], one[precision], bounds[precision])


def test_precisions_are_different_ones(one):
    assert one["bf16-mixed"]["dtypes"] == {"torch.float32"}
    assert one["bf16-true"]["dtypes"] == one["bf16-true"]["optimizer"] == {"torch.bfloat16"}
    assert one["64-true"]["dtypes"] == {"torch.float64"}
    for precision in HALF:
        assert distance(one[precision], one["32-true"])[0] > 5e-5


@pytest.mark.parametrize(
    ("precision", "off"),
    [("32-true", 1e-5), ("64-true", 1e-11), ("bf16-mixed", 5e-3), ("16-mixed", 1e-3), ("bf16-true", 0.03)],
)
def test_a_single_wrong_weight_shows(one, bounds, precision, off):
    wrong = {name: value.clone() for name, value in one[precision]["weights"].items()}
    wrong["blocks.1.up.weight"][3, 5] += off
    with pytest.raises(AssertionError, match="a weight differs by"):
        check({**one[precision], "weights": wrong}, one[precision], bounds[precision])


@pytest.mark.parametrize("layout", quick(TWO, "fsdp2", "pp2"))
def test_a_step_that_overflows_on_one_rank_is_left_out_on_all(ranks2: RankGroup, one, bounds, layout):
    poison: dict[str, Any] = {"poison": "blocks.1.up.weight", "rank": 0}
    results = ranks2.call(jobs.precise, layout, "16-mixed", poison)
    expected = reference(jobs.precise, None, "16-mixed", poison)
    assert [r["scale"] for r in results] == [512.0, 512.0] == [expected["scale"]] * 2
    check(results[0], expected, bounds["16-mixed"])
    assert distance(expected, one["16-mixed"])[1] > 1e-3, "leaving out a step makes a difference"


@pytest.mark.parametrize("layout", quick(["dp2", "pp2"], "pp2"))
def test_loss_scales_with_accumulated_batches_and_clipping(ranks2: RankGroup, bounds, layout):
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    results = ranks2.call(jobs.precise, layout, "16-mixed", **options)
    check(results[0], reference(jobs.precise, None, "16-mixed", **options), bounds["16-mixed"])


@pytest.mark.parametrize(
    ("precision", "saved", "resumed"),
    [
        ("16-mixed", "pp2", "fsdp2"),
        slow("bf16-true", "tp2", "pp2"),
        slow("bf16-true", "pp2", "fsdp2"),
        slow("16-mixed", "tp2", "pp2"),
    ],
)
def test_a_checkpoint_keeps_types_and_scale(ranks2: RankGroup, bounds, tmp_path, precision, saved, resumed):
    path = str(tmp_path / "half.ckpt")
    poison: dict[str, Any] = {"poison": "stem.weight", "step": 2} if precision == "16-mixed" else {}
    whole = reference(jobs.precise, None, precision, poison, max_epochs=2)
    first = ranks2.call(jobs.precise, saved, precision, poison, save=path)[0]
    result = ranks2.call(jobs.precise, resumed, precision, ckpt_path=path, max_epochs=2)[0]
    check({**result, "losses": first["losses"] + result["losses"]}, whole, bounds[precision])


def test_ranks_of_a_product_agree_on_the_scale(ranks4: RankGroup):
    result = ranks4.call(jobs.precise, "fsdp2-tp2", "16-mixed", {"poison": "head.weight", "rank": 3})
    assert {r["scale"] for r in result} == {512.0}
    assert all(torch.isfinite(w).all() for w in result[0]["weights"].values())
