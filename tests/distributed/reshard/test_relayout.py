"""The layout changes while training goes on: as if it had not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.reshard import relayout_jobs as jobs
from tests.harness import RankError, RankGroup
from tests.pairwise import slow


@pytest.fixture(scope="module")
def plain(ranks4: RankGroup) -> dict[str, Any]:
    """A run that stays in one layout."""
    return ranks4.call(jobs.train, "dp4")[0]


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["changed"] == [], "weights and optimizer state are bit-equal right after a move"
    assert found["objects"] == 1, "the module and its optimizers are the same objects"
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=1e-6)
    assert found["rates"] == expected["rates"]
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_layouts_are_one_run(ranks4: RankGroup, plain: dict[str, Any], seed: int) -> None:
    layouts = jobs.random_layouts(seed, 30)
    found = ranks4.call(jobs.train, "dp4", layouts)[0]
    assert len(found["moved"]) == 6
    for before, after, sent, _ in found["moved"]:
        assert sent == 0 or before not in ("dp4", after), "a rank that has everything lacks nothing"
    assert any(sent for _, _, sent, _ in found["moved"])
    check(found, plain)


@pytest.mark.parametrize("seed", [slow(0), slow(1), slow(2)])
def test_experts_move(ranks4: RankGroup, seed: int) -> None:
    layouts = jobs.random_layouts(seed, 30, experts=True)
    assert any("ep" in layout for layout in layouts.values())
    expected = ranks4.call(jobs.train, "dp4", kind="Mixture")[0]
    found = ranks4.call(jobs.train, "dp4", layouts, kind="Mixture")[0]
    check(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, -2], ids=["workers", "workers that persist"])
def test_loader_workers(ranks4: RankGroup, plain: dict[str, Any], workers: int) -> None:
    options = {"num_workers": abs(workers), "persistent_workers": workers < 0, "multiprocessing_context": "fork"}
    layouts = {3: "tp2-pp2", 14: "fsdp4"}
    expected = ranks4.call(jobs.train, "dp4", loader_options=options)[0]
    check(ranks4.call(jobs.train, "dp4", layouts, loader_options=options)[0], expected)


@pytest.mark.parametrize(
    "layouts", [{5: "tp2-pp2", 6: "fsdp4"}, slow({0: "pp4", 5: "tp2-pp2", 6: "dp4", 12: "dp2-fsdp2"})]
)
def test_between_accumulated_steps_and_epochs(ranks4: RankGroup, layouts: dict[int, str]) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "steps": 15}
    expected = ranks4.call(jobs.train, "fsdp4", **options)[0]
    check(ranks4.call(jobs.train, "fsdp4", layouts, **options)[0], expected)


@pytest.mark.slow
def test_cuts_that_are_chosen(ranks4: RankGroup, plain: dict[str, Any]) -> None:
    found = ranks4.call(jobs.train, "dp4", {4: "pp4"}, relayout_options={"cuts": (2, 3, 5)})[0]
    check(found, plain)
    with pytest.raises(RankError, match=r"`cuts` must be 3 ascending numbers of calls.*Training is in `layout='dp4'`"):
        ranks4.call(jobs.train, "dp4", {4: "pp4"}, relayout_options={"cuts": (2, 3)})


@pytest.mark.slow
def test_averages_move(ranks4: RankGroup) -> None:
    found, expected = (ranks4.call(jobs.averaged, layouts)[0] for layouts in ({6: "tp2-pp2", 13: "fsdp4"}, {}))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.slow
def test_checkpoints_have_the_same_names(ranks4: RankGroup, tmp_path: Path) -> None:
    """And a run goes on from one that was saved in another layout than it began with."""
    whole, names = ranks4.call(jobs.saved, str(tmp_path / "a"), {4: "tp2-pp2", 9: "fsdp4"})[0]
    _, plain_names = ranks4.call(jobs.saved, str(tmp_path / "b"), {})[0]
    assert names == plain_names
    resumed = ranks4.call(jobs.train, "fsdp4", steps=20, ckpt_path=str(tmp_path / "a" / "step=12.ckpt"))[0]
    torch.testing.assert_close(torch.tensor(resumed["losses"]), torch.tensor(whole[12:]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "to", "options", "message"),
    [
        ("dp4", "tp2", {}, "`layout` must use every device once. Got 'tp2'"),
        (
            "dp4",
            "pp2-tp2",
            {"batch": 4, "accumulate_grad_batches": 2, "in_window": True},
            "between two steps of the opt",
        ),
        ("tp4", "dp4", {"batch": 6}, "a batch of 6 samples cannot be shared by 4 replicas"),
        ("dp4", "tp4", {"loader": "batches"}, "the batches of a batch sampler cannot be made larger or smaller"),
        ("dp4", "tp4", {"loader": "stream"}, "shards the data over other replicas. That is not possible"),
        ("dp4", "tp4", {"differs": True}, "`relayout` must be called alike on all ranks"),
        ("dp4", "pp4", {"manual": True}, "optimizes manually"),
    ],
)
def test_refused(ranks4: RankGroup, layout: str, to: str, options: dict[str, Any], message: str) -> None:
    """Before anything changes, on all ranks."""
    for found in ranks4.call(jobs.refused, layout, to, **options):
        assert message in found["error"]
        assert found["layout"] == layout
        assert found["steps"] == 4, "training goes on"
