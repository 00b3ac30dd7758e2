"""Optimizers, clipping and compiled blocks give what they give in one process, or are refused before training."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

import pytest
import torch

from tests.distributed.engine import optimizer_jobs as jobs
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import in_turn, quick, slow

TWO = ["dp2", "fsdp2", "tp2", "pp2"]
EVERYWHERE = ["AdamW, foreach", "AdamW, fused", "SGD, foreach", "groups and a schedule"]


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.feature(by="optimizer", prefix="optimizer: ")
@pytest.mark.parametrize(("layout", "optimizer"), quick(itertools.product(TWO, EVERYWHERE), *in_turn(TWO, EVERYWHERE)))
def test_optimizers(ranks2: RankGroup, layout, optimizer):
    found = ranks2.call(jobs.optimized, layout, {"optimizer": optimizer})[0]
    check(found, reference(jobs.optimized, None, {"optimizer": optimizer}))


@pytest.mark.parametrize("optimizer", ["AdamW, foreach", slow("groups and a schedule")])
def test_optimizers_under_a_product(ranks4: RankGroup, optimizer):
    found = ranks4.call(jobs.optimized, "fsdp2-tp2", {"optimizer": optimizer}, gradient_clip_val=0.05)[0]
    check(found, reference(jobs.optimized, None, {"optimizer": optimizer}, gradient_clip_val=0.05))


@pytest.mark.feature(by="optimizer", prefix="optimizer: ")
@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ("pp2", "Adafactor"),
        ("pp2", "SGD, fused"),
        ("dp2", "LBFGS"),
        slow("dp2", "Adafactor"),
        slow("dp2", "SGD, fused"),
    ],
)
def test_optimizers_that_need_whole_weights(ranks2: RankGroup, layout, optimizer):
    found = ranks2.call(jobs.optimized, layout, {"optimizer": optimizer})[0]
    check(found, reference(jobs.optimized, None, {"optimizer": optimizer}))


@pytest.mark.feature(by="optimizer", prefix="optimizer: ", refused=True)
@pytest.mark.parametrize(
    ("layout", "optimizer", "message"),
    [
        ("fsdp2", "Adafactor", r"returned Adafactor, which torch has not written for divided.*`layout='fsdp2'`"),
        ("tp2", "SGD, fused", r"returned SGD\(fused=True\), which torch has not written.*Use `fused=False`"),
        ("pp2", "LBFGS", r"returned LBFGS.*`layout='pp2'` divides them among ranks. Use a layout of `dp` only"),
    ],
)
def test_optimizers_that_are_refused(ranks2: RankGroup, layout, optimizer, message):
    with pytest.raises(RankError, match=message):
        ranks2.call(jobs.optimized, layout, {"optimizer": optimizer})


@pytest.mark.parametrize("layout", quick(TWO, "tp2", "pp2"))
def test_a_warm_up_and_clipping_of_the_users_own(ranks2: RankGroup, layout):
    options: dict[str, Any] = {"warm_up": True, "clip": "configured"}
    expected = reference(jobs.optimized, None, options)
    check(ranks2.call(jobs.optimized, layout, options)[0], expected)
    assert not torch.allclose(
        expected["head.weight"], reference(jobs.optimized, None, {"warm_up": True})["head.weight"]
    )


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2"], "fsdp2"))
def test_clipping_by_hand(ranks2: RankGroup, layout):
    check(
        ranks2.call(jobs.optimized, layout, {"clip": "by hand"})[0],
        reference(jobs.optimized, None, {"clip": "by hand"}),
    )


@pytest.mark.feature("clipping by norm and by value")
@pytest.mark.parametrize(
    ("layout", "algorithm"),
    quick(itertools.product(["fsdp2-tp2", "tp2-pp2", "fsdp2-pp2"], ["norm", "value"]), ("fsdp2-tp2", "norm")),
)
def test_clipping_under_products(ranks4: RankGroup, layout, algorithm):
    options: dict[str, Any] = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm}
    check(ranks4.call(jobs.optimized, layout, {}, **options)[0], reference(jobs.optimized, None, {}, **options))


@pytest.mark.feature("`compile=True`: compiles each block")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("layout", TWO)
def test_compiled_blocks(ranks2: RankGroup, layout):
    found = ranks2.call(jobs.optimized, layout, {}, strategy_options={"compile": True}, timeout_seconds=150)[0]
    check(found, reference(jobs.optimized, None, {}))


def test_a_module_that_the_user_has_compiled_is_refused(ranks2: RankGroup):
    with pytest.raises(RankError, match="compiled model is incompatible with the current strategy"):
        ranks2.call(jobs.whole_model_compiled, "dp2")
