"""`gradient_sync=`: what replicas send each other, and how far that is from the exact mean."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.spec.gradient_sync import GradientSync
from tests.distributed.replicas import sync_jobs as jobs
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

FEATURE = "`gradient_sync=`"


@pytest.mark.parametrize(
    ("kind", "bound"), [("exact", 2e-7), ("bf16", 1e-2), ("bf16_fp32acc", 2**-7), ("hierarchical", 2e-7)]
)
@pytest.mark.parametrize("elements", [5, pytest.param(1003, marks=pytest.mark.slow)])
def test_sums(ranks4: RankGroup, kind: str, bound: float, elements: int) -> None:
    """50 times in a row, without a hang; all ranks have the same. bfloat16 rounds by 2^-9, what is sent and the sum."""
    results = ranks4.call(jobs.reduced, kind, elements, inner=2, repetitions=50)
    for found, error in results:
        assert error <= bound
        assert torch.equal(found, results[0][0])


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("kind", "layout"),
    quick(
        itertools.product(["bf16", "bf16_fp32acc"], ["dp2", "fsdp2", "dp2-pp2", "fsdp2-pp2", "dp2-tp2"]),
        ("bf16", "dp2"),
        ("bf16_fp32acc", "fsdp2"),
    ),
)
def test_gradients_in_bfloat16(request: pytest.FixtureRequest, layout: str, kind: str) -> None:
    """Half of the bytes; the gradient of the first step is that of the exact way up to the rounding of bfloat16."""
    ranks = request.getfixturevalue("ranks4" if "-" in layout else "ranks2")
    found, expected = (ranks.call(jobs.train, layout, sync)[0] for sync in (kind, "exact"))
    assert found["sent"] == pytest.approx(expected["sent"] / 2)
    torch.testing.assert_close(found["gradients"][0], expected["gradients"][0], rtol=8e-3, atol=1e-4)
    assert not torch.equal(found["gradients"][0], expected["gradients"][0])
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-2, atol=2e-3, msg=name)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize("layout", quick(["dp4", "dp2-pp2"], "dp4"))
def test_hierarchical_is_exact(ranks4: RankGroup, layout: str) -> None:
    found = ranks4.call(jobs.train, layout, GradientSync(kind="hierarchical", inner=2))[0]
    expected = ranks4.call(jobs.train, layout)[0]
    torch.testing.assert_close(found["gradients"][0], expected["gradients"][0], rtol=2e-7, atol=1e-8)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-6, atol=1e-7, msg=name)


def test_another_way_from_a_step_on(ranks2: RankGroup) -> None:
    results = [ranks2.call(jobs.train, "dp2", *how)[0] for how in (("exact", "bf16"), ("exact",), ("bf16",))]
    found, exact, short = (result["gradients"] for result in results)
    assert results[0]["logged"] == {3: results[2]["sent"]}
    assert results[2]["logged"] == {0: results[2]["sent"]}
    assert all(torch.equal(a, b) for a, b in zip(found[:3], exact[:3], strict=True))
    assert not torch.equal(found[3], exact[3])
    assert not torch.equal(found[3], short[3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "sync"),
    [
        ("dp4", "exact"),
        ("dp4", "bf16"),
        ("fsdp4", "bf16_fp32acc"),
        ("dp4", GradientSync(kind="hierarchical", inner=2)),
        ("dp4", GradientSync(kind="diloco", every_n_steps=2)),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_fifty_runs_end_alike(ranks4: RankGroup, layout: str, sync: Any) -> None:
    found = ranks4.call(jobs.fifty, layout, sync, timeout_seconds=300.0)[0]
    assert len(found) == 50
    assert set(found) == {found[0]}


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize("layout", ["dp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dp2-tp2", "dp2-pp2"))])
def test_replicas_that_step_by_themselves(request: pytest.FixtureRequest, layout: str) -> None:
    """12 steps, of which the last two make a short round, over an epoch's end."""
    ranks = request.getfixturevalue("ranks4" if "-" in layout else "ranks2")
    sync = GradientSync(kind="diloco", every_n_steps=5)
    found = ranks.call(jobs.diloco, layout, sync, samples=64)[0]
    expected = jobs.diloco_in_one_process(2, sync, samples=64)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=1e-6)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=2e-6, msg=name)
    assert found["sent"] == pytest.approx(ranks.call(jobs.diloco, layout, "exact")[0]["sent"] / 5)


def test_agreeing_in_every_step_on_the_mean_is_exact(ranks2: RankGroup) -> None:
    """With plain SGD, whose step is linear in the gradient."""
    sync = GradientSync(kind="diloco", every_n_steps=1, outer_learning_rate=1.0, outer_momentum=0.0)
    found, expected = (ranks2.call(jobs.diloco, "dp2", how, optimizer="sgd")[0] for how in (sync, "exact"))
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_replicas_go_on_where_each_was(ranks2: RankGroup, tmp_path: Path) -> None:
    """Saved in the middle of a round: bit for bit in the same layout; in another one from what was agreed on."""
    path, sync = str(tmp_path / "checkpoint"), GradientSync(kind="diloco", every_n_steps=5)
    whole = ranks2.call(jobs.diloco, "dp2", sync, save=path, save_at=8)[0]
    resumed = ranks2.call(jobs.diloco, "dp2", sync, ckpt_path=path)[0]
    assert resumed["losses"] == whole["losses"][8:]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight)
    elsewhere = ranks2.call(jobs.diloco, "tp2", "exact", ckpt_path=path)[0]
    assert len(elsewhere["losses"]) == 4
    assert elsewhere["losses"][0] == pytest.approx(whole["losses"][8], abs=0.2)


@pytest.mark.parametrize(
    ("layout", "sync", "message"),
    [
        ("dp2-fsdp2", "bf16", "gradients of sharded replicas are scattered over `fsdp` and then summed over `dp`"),
        ("fsdp4", "hierarchical", "with `fsdp` gradients are summed over its ranks first"),
        ("dp2-fsdp2", "diloco", "so they cannot step independently"),
        ("dp4", GradientSync(kind="hierarchical", inner=3), "`inner=3` must divide the replicas"),
    ],
)
def test_refused(ranks4: RankGroup, layout: str, sync: Any, message: str) -> None:
    with pytest.raises(RankError, match=message):
        ranks4.call(jobs.train, layout, sync)


def test_values_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="`gradient_sync` must be one of exact, bf16, bf16_fp32acc, hierarchical, dil"):
        GradientSync.of("fp8")
    with pytest.raises(ValueError, match="`outer_momentum` must be at least 0 and below 1"):
        GradientSync(kind="diloco", outer_momentum=1.0)
    with pytest.raises(ValueError, match="`inner` is the number of neighbors of 'hierarchical'"):
        GradientSync(kind="bf16", inner=2)
