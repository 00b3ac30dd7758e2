"""Recomputation changes nothing but memory, under every layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed.engine import numbers_jobs
from tests.distributed.experts import expert_jobs
from tests.distributed.reference import reference
from tests.harness import RankGroup
from tests.pairwise import quick

FEATURE = "activation checkpointing, `recompute=`"


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("layout", "how"),
    quick(
        itertools.product(["dp2", "fsdp2", "tp2", "pp2", "fsdp2-pp2", "fsdp2-tp2"], ["selective", "full"]),
        ("fsdp2", "full"),
        ("tp2", "selective"),
        ("pp2", "full"),
    ),
)
def test_with_dropout(request: pytest.FixtureRequest, layout: str, how: str) -> None:
    ranks: RankGroup = request.getfixturevalue("ranks4" if "-" in layout else "ranks2")
    module = {"inside": 0.2, "outside": 0.2}
    plain = ranks.call(numbers_jobs.dropout, layout, module)
    again = ranks.call(numbers_jobs.dropout, layout, module, strategy_options={"recompute": how})
    for before, after in zip(plain, again, strict=True):
        assert after["losses"] == pytest.approx(before["losses"], rel=1e-6)
    for name, value in plain[0]["weights"].items():
        torch.testing.assert_close(again[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize("how", quick(["selective", "full"], "selective"))
@pytest.mark.parametrize("layout", quick(["ep2", "fsdp2-ep2", "ep2-pp2", "ep2-tp2"], "ep2"))
def test_with_experts(request: pytest.FixtureRequest, layout: str, how: str) -> None:
    ranks: RankGroup = request.getfixturevalue("ranks4" if "-" in layout else "ranks2")
    results = ranks.call(expert_jobs.fit, layout, strategy_options={"recompute": how})
    expected = reference(expert_jobs.fit, None)
    assert results[0]["loads"] == expected["loads"]  # counted once
    for name, value in expected["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("layout", ["dp2", "fsdp2"])
def test_with_compilation(ranks2: RankGroup, layout: str, how: str) -> None:
    options = {"recompute": how, "compile": True}
    plain = ranks2.call(numbers_jobs.dropout, layout, {})
    again = ranks2.call(numbers_jobs.dropout, layout, {}, strategy_options=options, timeout_seconds=150.0)
    for name, value in plain[0]["weights"].items():
        torch.testing.assert_close(again[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)
