"""`LoadRebalancing` on ranks of different speed: what is moved, and that the result stays that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.callbacks import Phase
from tests.distributed.callbacks import rebalancing_jobs as jobs
from tests.harness import RankError, RankGroup
from tests.pairwise import slow

STAGES: dict[str, Any] = {"blocks": 16, "seconds": 0.008, "strategy_options": {"microbatches": 8}}
SHARES: dict[str, Any] = {"blocks": 2, "seconds": 0.003, "by_sample": True, "batch": 32}
SLOW = {2: 2.0}


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=1e-6)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.slow
def test_blocks_leave_a_slow_stage(ranks4: RankGroup) -> None:
    found = ranks4.call(jobs.train, "pp4", True, slow=SLOW, **STAGES)[0]
    assert [m["kind"] for m in found["moves"]] == ["stages"]
    first, second, third = found["cuts"]
    assert third - second == 1, "the slow rank keeps one block"
    assert {first, second - first} <= {5, 6}
    assert found["last"] < 0.85 * found["first"]
    check(found, ranks4.call(jobs.train, "pp4", False, **STAGES | {"seconds": 0.0})[0])


@pytest.mark.parametrize(
    ("layout", "timed"), [("dp4", False), slow("dp4", True), slow("fsdp4", True), slow("dp2-fsdp2", True)]
)
def test_a_slow_replica_gets_fewer_samples(ranks4: RankGroup, layout: str, timed: bool) -> None:
    """Steps are faster then, which is measured where no other tests run beside."""
    found = ranks4.call(jobs.train, layout, True, slow=SLOW, **SHARES)[0]
    (move,) = found["moves"]
    assert move["kind"] == "replicas"
    assert sum(move["division"]) == 32
    assert move["division"][2] in (4, 5)
    if timed:
        assert found["last"] < 0.85 * found["first"]
    check(found, ranks4.call(jobs.train, layout, False, **SHARES | {"seconds": 0.0})[0])


@pytest.mark.slow
def test_another_layout_is_balanced_anew(ranks4: RankGroup) -> None:
    phases = [Phase(), Phase(at_step=10, layout="dp2-pp2", microbatches=4)]
    options = SHARES | {"options": {"kinds": ("replicas",)}, "phases": phases, "steps": 22}
    found = ranks4.call(jobs.train, "dp4", True, slow=SLOW, **options)[0]
    first, second = found["moves"]
    assert first["step"] < 10 < second["step"]
    assert len(first["division"]) == 4
    assert second["division"][0] < second["division"][1], "ranks 0 and 2 are the first replica now"
    check(found, ranks4.call(jobs.train, "dp4", False, steps=22, **SHARES | {"seconds": 0.0})[0])


@pytest.mark.slow
def test_hot_experts_are_separated(ranks4: RankGroup) -> None:
    """All tokens go to the first two experts, which stand on the same rank in the beginning."""
    found = ranks4.call(jobs.train, "dp2-ep2", True, experts=True, steps=24)[0]
    (move,) = found["moves"]
    assert move["kind"] == "experts"
    assert all({0, 1} <= {order[0], order[2]} for order in move["division"]["orders"].values())
    assert move["gain"] == pytest.approx(0.5)
    assert found["logged"]["rebalancing/experts_gain"] == pytest.approx(0.0)
    check(found, ranks4.call(jobs.train, "dp2-ep2", False, experts=True, steps=24)[0])


@pytest.mark.slow
def test_hot_experts_get_copies(ranks4: RankGroup) -> None:
    """All tokens go to one expert: no placement without copies helps."""
    options: dict[str, Any] = {"experts": True, "steps": 24, "module_options": {"chosen": 1}}
    found = ranks4.call(jobs.train, "dp2-ep2", True, options={"expert_copies": 1}, **options)[0]
    (move,) = found["moves"]
    assert all({0} <= set(hosted) for hosts in move["division"]["hosts"].values() for hosted in hosts)
    assert move["gain"] == pytest.approx(0.5)
    assert found["logged"]["rebalancing/experts_gain"] == pytest.approx(0.0)
    expected = ranks4.call(jobs.train, "dp2-ep2", True, **options)[0]
    assert expected["moves"] == []
    check(found, expected)


@pytest.mark.slow
def test_equal_ranks_are_left_alone(ranks4: RankGroup) -> None:
    found = ranks4.call(jobs.train, "pp4", True, steps=18, **STAGES | {"seconds": 0.004})[0]
    assert found["moves"] == []
    assert abs(found["logged"]["rebalancing/stages_gain"]) < 0.05


@pytest.mark.slow
def test_a_move_that_does_not_help_is_taken_back(ranks2: RankGroup) -> None:
    """Blocks that take as long for few samples as for many, which is not known beforehand."""
    options = SHARES | {"seconds": 0.01, "by_sample": False, "slow": {1: 3.0}}
    found = ranks2.call(jobs.train, "dp2", True, **options)[0]
    there, back = found["moves"]
    assert not there["taken_back"]
    assert back["taken_back"]
    assert back["division"] == (16, 16)
    check(found, ranks2.call(jobs.train, "dp2", False, **SHARES | {"seconds": 0.0})[0])


@pytest.mark.slow
def test_only_what_is_asked_for_is_moved(ranks2: RankGroup) -> None:
    options = {"kinds": ("stages", "experts")}
    found = ranks2.call(jobs.train, "dp2", True, slow={1: 3.0}, options=options, steps=9, **SHARES)[0]
    assert found["moves"] == []
    assert "rebalancing/replicas_gain" not in found["logged"]


@pytest.mark.parametrize("layout", ["dp2", slow("pp2")])
def test_resumed_run_keeps_the_balance(ranks2: RankGroup, layout: str, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    options: dict[str, Any] = (STAGES | {"blocks": 8} if layout == "pp2" else SHARES) | {"slow": {1: 3.0}}
    whole = ranks2.call(jobs.train, layout, True, save=path, save_at=10, **options)[0]
    assert len(whole["moves"]) == 1
    resumed = ranks2.call(jobs.train, layout, True, ckpt_path=path, steps=13, **options)[0]
    assert resumed["moves"] == whole["moves"]
    assert resumed["cuts"] == whole["cuts"]
    torch.testing.assert_close(torch.tensor(resumed["losses"]), torch.tensor(whole["losses"][10:13]), rtol=0, atol=1e-6)


def test_another_strategy(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="`LoadRebalancing` needs `strategy=HybridStrategy"):
        ranks2.call(jobs.train, None, True, steps=1)
