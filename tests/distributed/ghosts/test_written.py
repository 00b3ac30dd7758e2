"""Weights that a step writes in place are those of one process, or the run is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lightning_hybrid.tensor import regions
from tests.distributed.ghosts import modules, written_jobs
from tests.distributed.ghosts.test_user_code import fit
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

FEATURE, MAX_NORM = "weights that the step writes in place", "an embedding with `max_norm`"
SPARSE, SCRIPT = "sparse gradients", "modules of TorchScript"
LAYOUTS = ["dp2", "fsdp2", "tp2", "pp2"]


def train(layout: str | None, kind: str, **options: Any) -> dict[str, Any]:
    """Trains a module of this file's jobs."""
    setattr(modules, kind, getattr(written_jobs, kind))
    return fit(layout, kind, **options)


def train_with_lost_writes(layout: str) -> None:
    """Trains with a bias that is divided, although the step writes it."""
    regions._check_row = lambda *_: None
    train(layout, "HalvedBlocks")


def check(ranks: RankGroup, layout: str, kind: str) -> None:
    """Compares all weights with those of one process."""
    expected, found = train(None, kind), ranks.call(train, layout, kind)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("layout", "kind"),
    quick(
        itertools.product(LAYOUTS, ["ScaledBlocks", "HalvedBlocks"]), ("tp2", "HalvedBlocks"), ("fsdp2", "ScaledBlocks")
    ),
)
def test_equals_one_process(ranks2: RankGroup, layout: str, kind: str) -> None:
    check(ranks2, layout, kind)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2-tp2", "tp2-pp2"])
def test_equals_one_process_on_four_ranks(ranks4: RankGroup, layout: str) -> None:
    check(ranks4, layout, "ScaledBlocks")


@pytest.mark.feature(MAX_NORM)
@pytest.mark.parametrize("layout", quick(["tp2", "pp2"], "tp2"))
def test_rows_that_a_batch_scales(ranks2: RankGroup, layout: str) -> None:
    check(ranks2, layout, "Bounded")


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "pp2"], "pp2"))
def test_weights_that_are_computed_in_each_call(ranks2: RankGroup, layout: str) -> None:
    check(ranks2, layout, "Pruned")


@pytest.mark.parametrize("layout", quick(LAYOUTS, "fsdp2"))
def test_a_weight_without_elements(ranks2: RankGroup, layout: str) -> None:
    check(ranks2, layout, "Empty")


@pytest.mark.parametrize(
    ("layout", "kind", "message"),
    [
        pytest.param(layout, kind, message, marks=[*marks, pytest.mark.feature(feature, refused=True)])
        for kind, message, feature in (
            ("Bounded", "writes the parameter `embedding.weight`", MAX_NORM),
            ("Sparse", r"`embedding` \(Embedding\) of Sparse has `sparse=True`", SPARSE),
            ("Scripted", r"`blocks.0` of Scripted is a module of TorchScript", SCRIPT),
        )
        for layout, marks in (("dp2", []), ("fsdp2", [pytest.mark.slow]))
    ],
)
def test_is_refused(ranks2: RankGroup, layout: str, kind: str, message: str) -> None:
    with pytest.raises(RankError, match=f"(?s)PartitionError.*{message}"):
        ranks2.call(train, layout, kind)


def test_a_write_that_is_lost_is_found(ranks2: RankGroup) -> None:
    """The step and its gradients are right; the next step is not."""
    with pytest.raises(RankError, match=r"leaves `blocks.1.down.bias` in another state than one process"):
        ranks2.call(train_with_lost_writes, "tp2")
