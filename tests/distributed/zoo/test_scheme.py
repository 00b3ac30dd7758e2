"""The scheme's own model under every layout: Muon and moments in bfloat16, and routers balanced by the load of all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.reference import reference
from tests.distributed.zoo import scheme_jobs as jobs
from tests.harness import RankGroup
from tests.pairwise import quick

TWO = ["dp2", "fsdp2", "tp2", "pp2", "ep2"]
FOUR = ["fsdp2-ep2", "ep2-pp2", "ep2-tp2", "fsdp2-tp2", "fsdp2-pp2"]


def ranks_of(request: pytest.FixtureRequest, layout: str) -> RankGroup:
    return request.getfixturevalue("ranks4" if "-" in layout else "ranks2")


@pytest.mark.feature("Muon combined with AdamW (`models.Muon`)")
@pytest.mark.parametrize("layout", quick([*TWO, *FOUR], "fsdp2"))
def test_muon(request: pytest.FixtureRequest, layout: str) -> None:
    optimizer = {"name": "muon"}
    results = ranks_of(request, layout).call(jobs.fit, layout, optimizer=optimizer)
    expected = reference(jobs.fit, None, optimizer=optimizer)
    assert results[0]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    for name, value in expected["weights"].items():
        # five steps of Newton and Schulz make small singular values, and so their rounding, larger
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.feature("moments in bfloat16 (`models.AdamWBF16`)")
@pytest.mark.parametrize("layout", quick([*TWO, *FOUR], "ep2"))
def test_moments_in_bfloat16(request: pytest.FixtureRequest, layout: str) -> None:
    optimizer = {"moments": "bfloat16", "learning_rate": 3e-3}
    results = ranks_of(request, layout).call(jobs.fit, layout, optimizer=optimizer)
    expected = reference(jobs.fit, None, optimizer=optimizer)
    assert results[0]["losses"] == pytest.approx(expected["losses"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "ep2", "tp2"])
def test_resumes_bit_for_bit_with_moments_in_bfloat16(
    ranks2: RankGroup, tmp_path: Path, layout: str, name: str
) -> None:
    options: dict[str, Any] = {"optimizer": {"name": name, "moments": "bfloat16", "schedule": "stable"}}
    path = str(tmp_path / "half.ckpt")
    whole = ranks2.call(jobs.fit, layout, save=path, **options)[0]
    again = ranks2.call(jobs.fit, layout, ckpt_path=path, **options)[0]
    assert again["biases"] == whole["biases"][jobs.SAVED_STEP :]
    for key, value in whole["weights"].items():
        assert torch.equal(again["weights"][key], value), key


@pytest.mark.feature("router biases balanced by the load of all ranks")
@pytest.mark.parametrize(
    ("layout", "accumulate"), quick(itertools.product([*TWO, *FOUR], [1, 3]), ("dp2", 1), ("ep2", 3))
)
def test_biases_and_max_violation_are_those_of_one_process(
    request: pytest.FixtureRequest, layout: str, accumulate: int
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "optimizer": {"learning_rate": 1e-3}}
    results = ranks_of(request, layout).call(jobs.fit, layout, **options)
    expected = reference(jobs.fit, None, **options)
    assert expected["biases"][-1] != expected["biases"][0]
    for result in results:
        assert result["biases"] == expected["biases"]
        assert result["violations"] == pytest.approx(expected["violations"], nan_ok=True)


def test_biases_stand_still_at_the_end_of_the_run() -> None:
    moving, still = reference(jobs.fit, None), reference(jobs.fit, None, experts={"bias_share": 0.5})
    assert moving["biases"][3] != moving["biases"][2]
    assert still["biases"][:3] == moving["biases"][:3]
    assert still["biases"][2] == still["biases"][5]


@pytest.mark.feature("precision bf16-mixed, with experts")
@pytest.mark.parametrize("layout", quick(["ep2", "fsdp2-ep2", "ep2-pp2"], "ep2"))
def test_bfloat16(request: pytest.FixtureRequest, layout: str) -> None:
    results = ranks_of(request, layout).call(jobs.fit, layout, precision="bf16-mixed")
    expected = reference(jobs.fit, None, precision="bf16-mixed")
    assert results[0]["losses"] == pytest.approx(expected["losses"], rel=2e-2)
