"""Values logged by evaluation steps and hooks equal those of one process, or a warning says that they do not."""

from __future__ import annotations

import pytest

from tests.distributed.reference import reference
from tests.distributed.verification.logged_jobs import EVEN, EXACT, WARNED, fit
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

PLACES = {
    "Perplexity": "validation_step",
    "AfterBatch": "on_validation_batch_end",
    "OfTraining": "on_train_epoch_end",
}
FULL, UNEVEN, PADDED = 32, 27, 33
"""Samples of two batches; of one that replicas have 6 and 5 samples of; of one that one replica has no sample of."""


@pytest.mark.feature("values of an epoch: kept rows, sums, objects, metrics")
@pytest.mark.parametrize("samples", [FULL, UNEVEN, PADDED])
@pytest.mark.parametrize(
    ("layout", "kind"),
    quick(
        [(x, kind) for x in ("dp2", "fsdp2") for kind in EXACT],
        ("dp2", "Kept"),
        ("fsdp2", "Meter"),
        ("dp2", "Averaged"),
    ),
)
def test_values_are_those_of_one_process(ranks2: RankGroup, layout: str, kind: str, samples: int) -> None:
    expected = reference(fit, None, kind, samples)
    for found in ranks2.call(fit, layout, kind, samples):
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        assert found["warnings"] == []
        assert found["kept"] == 0


@pytest.mark.feature("values of an epoch that depend on the division of samples: a warning")
@pytest.mark.parametrize(
    ("layout", "kind"),
    quick(
        [(x, k) for x in ("dp2", "fsdp2") for k in WARNED],
        ("dp2", "Macro"),
        ("fsdp2", "Perplexity"),
        ("dp2", "OfCallback"),
    ),
)
def test_values_that_depend_on_the_division_are_a_warning(ranks2: RankGroup, layout: str, kind: str) -> None:
    expected = reference(fit, None, kind, FULL)["metrics"]
    found = ranks2.call(fit, layout, kind, FULL)
    assert found[0]["metrics"]["score"] != pytest.approx(expected["score"], rel=1e-3)
    (message,) = found[0]["warnings"]
    place = PLACES.get(kind, "on_validation_epoch_end")
    assert f"`{place}` (" in message
    assert "logged_jobs.py" in message
    assert "`score` is " in message
    assert "`mean`" not in message
    if "mean" in expected:
        assert found[0]["metrics"]["mean"] == pytest.approx(expected["mean"], rel=1e-5)


@pytest.mark.parametrize("kind", quick(["Macro", "Perplexity"], "Macro"))
def test_they_are_refused_before_training_if_strict(ranks2: RankGroup, kind: str) -> None:
    with pytest.raises(RankError, match=r"`verify='strict'`: `.*logs values that depend on how samples are divided"):
        ranks2.call(fit, "dp2", kind, FULL, verify="strict", sanity=2)


@pytest.mark.parametrize("kind", list(EVEN))
def test_means_over_batches_are_exact_unless_batches_are_uneven(ranks2: RankGroup, kind: str) -> None:
    expected = reference(fit, None, kind, FULL)
    (found, _) = ranks2.call(fit, "dp2", kind, FULL)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert found["warnings"] == []
    if kind == "Gathers":
        return  # refuses tensors of different shapes
    (found, _) = ranks2.call(fit, "dp2", kind, UNEVEN)
    assert len(found["warnings"]) == 1
