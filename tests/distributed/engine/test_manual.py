"""Manual optimization as users write it: toggled and frozen networks, gradients that the step reads and changes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.distributed.engine.manual_jobs import KINDS, OTHERS, fit
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

LAYOUTS = ["dp2", "fsdp2", "tp2"]


def compare(expected: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Compares weights and logged values with those of one process; a step must have been verified."""
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for result in found:
        assert result["logged"] == pytest.approx(expected["logged"], rel=1e-4)
        assert "largest relative difference" in " ".join(result["verified"].values()), result["verified"]


@pytest.mark.feature("manual optimization, toggled and frozen networks")
@pytest.mark.parametrize(
    ("layout", "kind"),
    quick(
        [p for p in itertools.product(LAYOUTS, KINDS) if p != ("tp2", "Sharpness")],
        ("dp2", "LeftFrozen"),
        ("fsdp2", "Toggled"),
        ("tp2", "ReadGradients"),
    ),
)
def test_weights_are_those_of_one_process(ranks2: RankGroup, layout: str, kind: str) -> None:
    compare(fit(None, kind), ranks2.call(fit, layout, kind))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2-tp2", "fsdp2-tp2", "dp2-fsdp2"])
@pytest.mark.parametrize("kind", ["Toggled", "Gan", "ReadGradients", "TorchClipped", "Accumulated", "Bounded", "Tied"])
def test_products(ranks4: RankGroup, layout: str, kind: str) -> None:
    compare(fit(None, kind), ranks4.call(fit, layout, kind))


@pytest.mark.slow
def test_weights_that_the_step_moves_are_not_divided(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="tp=2 cannot divide any weight"):
        ranks2.call(fit, "tp2", "Sharpness")


@pytest.mark.feature("values of weights and gradients read in hooks")
@pytest.mark.parametrize(
    ("layout", "kind"), quick(itertools.product(LAYOUTS, OTHERS), ("fsdp2", "FrozenInStep"), ("tp2", "ScaledByFloat"))
)
def test_flags_and_values_are_those_of_one_process(ranks2: RankGroup, layout: str, kind: str) -> None:
    compare(fit(None, kind), ranks2.call(fit, layout, kind))


@pytest.mark.slow
def test_stages_are_not_frozen_in_a_step(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"manual_jobs.py:\d+ .*freezes or unfreezes `.*on_train_batch_start"):
        ranks2.call(fit, "pp2", "FrozenInStep")


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "dp2"))
def test_a_backward_pass_that_is_not_weighted_is_refused(ranks2: RankGroup, layout: str) -> None:
    """On the uneven last batch; until then replicas have equal numbers of samples."""
    with pytest.raises(RankError, match=r"manual_jobs.py:\d+ \(training_step\) calls `loss.backward\(\)` on a batch"):
        ranks2.call(fit, layout, "RawBackward")


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2"], "tp2"))
def test_a_backward_pass_without_lightning_is_exact_on_equal_batches(ranks2: RankGroup, layout: str) -> None:
    compare(fit(None, "RawBackward", 24), ranks2.call(fit, layout, "RawBackward", 24))
