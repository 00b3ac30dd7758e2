"""Optimizers that use norms, sizes or positions of weights, or random numbers, equal one process, or are refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed.engine.user_optimizer_jobs import OPTIMIZERS, fit, notes_by_step
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

CASES = [("fsdp2", "Plain"), ("pp2", "Plain"), ("tp2", "Fused"), ("ep2", "Mixture"), ("dp2", "Plain")]
REFUSED = {
    *(("fsdp2", "FirstRow"), ("tp2", "FirstRow"), ("ep2", "FirstRow")),
    *(("pp2", "GlobalNorm"), ("ep2", "GlobalNorm")),
}


@pytest.mark.feature("optimizers of users: norms, sizes, random numbers")
@pytest.mark.parametrize(
    ("layout", "module", "optimizer"),
    quick(
        [(*case, name) for case, name in itertools.product(CASES, OPTIMIZERS) if (case[0], name) not in REFUSED],
        ("fsdp2", "Plain", "Langevin"),
        ("pp2", "Plain", "LambOfNumbers"),
        ("tp2", "Fused", "Langevin"),
        ("ep2", "Mixture", "Lamb"),
        ("ep2", "Mixture", "BySize"),
    ),
)
def test_weights_are_those_of_one_process(ranks2: RankGroup, layout: str, module: str, optimizer: str) -> None:
    expected, found = fit(None, module, optimizer), ranks2.call(fit, layout, module, optimizer)[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["Lamb", "LambOfNumbers", "Langevin", "BySize"])
@pytest.mark.parametrize(
    ("layout", "module"), [("fsdp2-pp2", "Plain"), ("fsdp2-ep2", "Mixture"), ("ep2-pp2", "Mixture"), ("ep4", "Mixture")]
)
def test_products(ranks4: RankGroup, layout: str, module: str, optimizer: str) -> None:
    expected, found = fit(None, module, optimizer), ranks4.call(fit, layout, module, optimizer)[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.feature("optimizers of users that mix stages, or write into parts of weights", refused=True)
@pytest.mark.parametrize(
    ("layout", "module", "optimizer"),
    quick(
        [(*case, name) for case, name in itertools.product(CASES, OPTIMIZERS) if (case[0], name) in REFUSED],
        ("fsdp2", "Plain", "FirstRow"),
        ("pp2", "Plain", "GlobalNorm"),
    ),
)
def test_refused(ranks2: RankGroup, layout: str, module: str, optimizer: str) -> None:
    with pytest.raises(RankError, match=r"user_optimizer_jobs.py:\d+ \((update|step)\)") as error:
        ranks2.call(fit, layout, module, optimizer)
    assert error.value.kind == "PartitionError"


def test_notes_of_tensors_do_not_add_up(ranks2: RankGroup) -> None:
    for found in ranks2.call(notes_by_step, "tp2"):
        assert len(found) == 9
        assert 0 < found[-1] == found[1]
