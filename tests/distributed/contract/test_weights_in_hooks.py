"""Hooks that draw random numbers for weights, or assign to them, have the result of one process, or are refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed.contract.weight_jobs import fit
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

KINDS = ("Noise", "Reset", "GradientNoise", "Dropped", "Assigned")


def compare(expected: dict[str, torch.Tensor], found: list[dict[str, torch.Tensor]]) -> None:
    """Compares the weights with those of one process."""
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.feature("hooks that change weights")
@pytest.mark.parametrize(
    ("layout", "kind"),
    quick(
        itertools.product(["dp2", "fsdp2", "tp2", "pp2"], KINDS),
        ("fsdp2", "Reset"),
        ("fsdp2", "GradientNoise"),
        ("tp2", "Assigned"),
        ("pp2", "Dropped"),
    ),
)
def test_weights_are_those_of_one_process(ranks2: RankGroup, layout: str, kind: str) -> None:
    compare(fit(None, kind), ranks2.call(fit, layout, kind))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2-tp2", "fsdp2-pp2", "tp2-pp2", "dp2-fsdp2"])
@pytest.mark.parametrize("kind", ["Reset", "GradientNoise", "Assigned"])
def test_products(ranks4: RankGroup, layout: str, kind: str) -> None:
    compare(fit(None, kind), ranks4.call(fit, layout, kind))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "pp2"])
def test_callbacks(ranks2: RankGroup, layout: str) -> None:
    compare(fit(None, "Plain", callback=True), ranks2.call(fit, layout, "Plain", callback=True))


@pytest.mark.feature("hooks that replace weights", refused=True)
@pytest.mark.parametrize(
    ("layout", "kind", "name"),
    quick(
        [(y, *k) for y in ("dp2", "fsdp2", "tp2", "pp2") for k in (("Swapped", "head.weight"), ("NewHead", "head"))],
        ("dp2", "NewHead", "head"),
        ("fsdp2", "Swapped", "head.weight"),
    ),
)
def test_replaced_weights_are_refused(ranks2: RankGroup, layout: str, kind: str, name: str) -> None:
    with pytest.raises(RankError, match=rf"`on_train_epoch_start` \(.*weight_jobs.py:\d+ .*replaces `{name}`"):
        ranks2.call(fit, layout, kind)


@pytest.mark.parametrize(
    ("layout", "kind", "what"),
    quick(
        [
            *((y, "Teacher", r"(`teacher(.weight)?`|a copy of a module)") for y in ("fsdp2", "tp2", "pp2")),
            *((y, "Grown", "`second`") for y in ("dp2", "fsdp2", "tp2", "pp2")),
        ],
        ("pp2", "Teacher", r"(`teacher(.weight)?`|a copy of a module)"),
        ("dp2", "Grown", "`second`"),
    ),
)
def test_added_weights_are_refused(ranks2: RankGroup, layout: str, kind: str, what: str) -> None:
    line = r"(\(.*weight_jobs.py:\d+ .*|.*, such as `on_fit_start`,)"
    with pytest.raises(RankError, match=rf"{line} adds {what}, whose weights"):
        ranks2.call(fit, layout, kind)


@pytest.mark.parametrize(("layout", "kind"), [("dp2", "Teacher"), pytest.param("pp2", "Kept", marks=pytest.mark.slow)])
def test_weights_that_need_nothing_may_be_added(ranks2: RankGroup, layout: str, kind: str) -> None:
    """A frozen copy on each replica, a module without weights, and a module where it has been."""
    compare(fit(None, kind), ranks2.call(fit, layout, kind))
