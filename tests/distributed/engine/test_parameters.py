"""`parameters()` shows the whole model of a pipeline: in the step, and in hooks, where values of others are refused."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.engine.parameters_jobs import fit
from tests.harness import RankError, RankGroup
from tests.pairwise import slow


@pytest.mark.feature("penalties on weights, and teachers that follow them", layout="pp2")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Penalty", {}),
        slow("Penalty", {"microbatches": 4}),
        ("Teacher", {}),
        *(slow(kind, {}) for kind in ("Target", "Followed", "InStep")),
    ],
)
def test_all_weights_are_there(ranks2: RankGroup, kind: str, options: dict[str, int]) -> None:
    expected, found = fit(None, kind)["weights"], ranks2.call(fit, "pp2", kind, **options)[0]["weights"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["Norms", "Values"])
def test_values_of_other_stages_are_refused_with_the_line(ranks2: RankGroup, kind: str) -> None:
    with pytest.raises(RankError, match=r"parameters_jobs.py:\d+") as caught:
        ranks2.call(fit, "pp2", kind)
    assert caught.value.kind == "PartitionError"
    assert "'dp2'" in str(caught.value)
