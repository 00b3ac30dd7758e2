"""Variables outside of the module that a step changes are those of one process, under every layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed.engine.outside_jobs import fit
from tests.harness import RankGroup
from tests.pairwise import quick


@pytest.mark.feature("global variables and those of enclosing functions")
@pytest.mark.parametrize(
    ("layout", "kind"),
    quick(
        itertools.product(["dp2", "fsdp2", "tp2", "pp2"], ["Global", "Enclosed", "Objects", "Iterators"]),
        ("pp2", "Global"),
        ("pp2", "Objects"),
        ("dp2", "Iterators"),
        ("pp2", "Iterators"),
        ("fsdp2", "Enclosed"),
    ),
)
def test_variables_are_those_of_one_process(ranks2: RankGroup, layout: str, kind: str) -> None:
    expected = fit(None, kind)
    for rank, found in enumerate(ranks2.call(fit, layout, kind)):
        assert (found["losses"], found["counts"]) == (expected["losses"], expected["counts"])
        for name, value in expected["weights"].items() if rank == 0 else ():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
