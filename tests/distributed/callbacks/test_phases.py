"""`PhaseSchedule`: layouts, batch sizes, lengths of sequences and streams change from phase to phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.callbacks import Phase, Plateau
from tests.distributed.callbacks import phase_jobs as jobs
from tests.harness import RankError, RankGroup


def close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=tolerance)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
def test_layouts_by_steps_samples_and_tokens(ranks4: RankGroup) -> None:
    """16 numbers in a sample are its tokens."""
    phases = [
        Phase(layout="fsdp4"),
        Phase(at_step=3, layout="tp2-pp2", microbatches=2),
        Phase(at_samples=48, layout="dp2-fsdp2", gradient_sync="exact"),
        Phase(at_tokens=9 * 8 * 16, layout="pp4", schedule="GPipe"),
    ]
    found = ranks4.call(jobs.train, "dp4", phases)[0]
    assert found["layouts"] == ["fsdp4"] * 3 + ["tp2-pp2"] * 3 + ["dp2-fsdp2"] * 3 + ["pp4"] * 3
    assert found["phases"] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert found["logged"]["phase"] == 3
    assert found["state"]["samples"] == 12 * 8
    close(found, ranks4.call(jobs.train, "dp4", [Phase()])[0], 1e-6)


def test_a_plateau_begins_a_phase(ranks2: RankGroup) -> None:
    plateau = Plateau(metric="loss_step", every_n_steps=2, patience=2, min_change=0.9)
    found = ranks2.call(jobs.train, "dp2", [Phase(), Phase(at_plateau=plateau, layout="tp2")])[0]
    assert found["layouts"] == ["dp2"] * 6 + ["tp2"] * 6, "the second look has no improvement, nor has the third"
    with pytest.raises(RankError, match="`at_plateau` needs the metric `nothing`, which is not logged"):
        ranks2.call(jobs.train, "dp2", [Phase(), Phase(at_plateau=Plateau(metric="nothing", every_n_steps=1))])


@pytest.mark.parametrize("layout", ["dp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_batches_and_lengths(ranks2: RankGroup, layout: str) -> None:
    """Short sequences first; then longer ones and larger batches, in two parts; then all of them in one."""
    phases = [
        Phase(sequence_length=4),
        Phase(at_step=3, sequence_length=8, batch_size=16, microbatch_size=4),
        Phase(at_step=5, sequence_length=0, microbatch_size=8, layout="tp2"),
    ]
    found = ranks2.call(jobs.train, layout, phases, kind="CausalLM", max_steps=7)[0]
    expected = jobs.in_one_process([8, 8, 8, 16, 16, 16, 16], [4, 4, 4, 8, 8, 16, 16])
    ends = [i for i in range(len(found["steps"])) if found["steps"][i] != (found["steps"] + [None])[i + 1]]
    assert len(ends) == 7
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("layout", ["pp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fsdp2", "tp2"))])
def test_streams_are_opened(ranks2: RankGroup, layout: str, tmp_path: Path) -> None:
    """With a change of layout; a run that is resumed behind it goes on as the whole one."""
    path = str(tmp_path / "checkpoint")
    phases = [Phase(), Phase(at_step=4, streams=2, layout=layout)]
    options: dict[str, Any] = {"kind": "CausalLM", "max_steps": 8}
    found = ranks2.call(jobs.train, "dp2", phases, save=path, save_at=6, **options)[0]
    assert found["streams"]["count"] == 2
    close(found, jobs.in_one_process([8] * 8, [16] * 8, streams_at=4))
    resumed = ranks2.call(jobs.train, "dp2", phases, ckpt_path=path, **options)[0]
    assert resumed["phases"] == [1, 1]
    close(resumed, {**found, "losses": found["losses"][6:]})


@pytest.mark.slow
def test_resumed_run_is_in_its_phase(ranks4: RankGroup, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    phases = [Phase(), Phase(at_step=3, layout="tp2-pp2", batch_size=16), Phase(at_samples=88, layout="fsdp4")]
    options: dict[str, Any] = {"samples": 160, "max_steps": 10}
    whole = ranks4.call(jobs.train, "dp4", phases, save=path, save_at=5, **options)[0]
    resumed = ranks4.call(jobs.train, "dp4", phases, ckpt_path=path, **options)[0]
    assert resumed["layouts"] == whole["layouts"][-len(resumed["layouts"]) :]
    assert resumed["steps"] == [s for s in whole["steps"] if s >= 5]
    assert resumed["state"] == whole["state"]
    close(resumed, {**whole, "losses": whole["losses"][-len(resumed["losses"]) :]}, 1e-6)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            [Phase(), Phase(at_step=3, layout="tp4")],
            "`phases`, phase 1: `layout` must use every device once. Got 'tp4'",
        ),
        ([Phase(), Phase(at_step=3, streams=2)], "`streams=2` needs a module with a method `open_streams"),
        ([Phase(batch_size=9)], "`batch_size=9` in phase 0 cannot be divided among 2 replicas"),
    ],
)
def test_refused(ranks2: RankGroup, phases: list[Phase], message: str) -> None:
    with pytest.raises(RankError, match=message):
        ranks2.call(jobs.train, "dp2", phases)
