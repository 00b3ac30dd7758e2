"""A run that is killed while it trains or saves goes on from the last complete checkpoint as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_hybrid.checkpoint.reader import SavedCheckpoint
from tests.distributed.checkpoint import checkpoint_jobs as jobs
from tests.distributed.checkpoint.test_checkpoints import LAST, assert_goes_on
from tests.faults.launch import run
from tests.harness import RankGroup

SCRIPT = Path(__file__).with_name("save_script.py")
BOUND_SECONDS = 15.0

CASES = [
    # layout, phase, rank, at which batch or which call in a save, the step to go on from, workers
    pytest.param("dp2", "step", 1, 3, 2, 2, id="killed in a step, shuffled, with workers", marks=pytest.mark.slow),
    pytest.param("pp2", "step", 0, 3, 2, 0, id="rank 0 killed in a step of a pipeline", marks=pytest.mark.slow),
    pytest.param("fsdp2", "writing", 1, 5, 4, 0, id="killed while writing the third time"),
    pytest.param("fsdp2", "writing", 1, 1, 0, 0, id="killed in the first save", marks=pytest.mark.slow),
    pytest.param("tp2", "manifest", 0, 5, 4, 0, id="killed before the manifest", marks=pytest.mark.slow),
    pytest.param("fsdp2", "rename", 0, 4, 4, 0, id="killed between the renames of last.ckpt", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("layout", "phase", "rank", "at", "step", "workers"), CASES)
def test_a_killed_run_goes_on(
    ranks2: RankGroup,
    tmp_path: Path,
    layout: str,
    phase: str,
    rank: int,
    at: int,
    step: int,
    workers: int,
    asynchronous: bool,
):
    fixed = ["--layout", layout, "--workers", str(workers), *(["--asynchronous"] if asynchronous else [])]
    killed = run(tmp_path, 2, *fixed, "--phase", phase, "--rank", str(rank), "--at", str(at), script=SCRIPT)
    assert killed.code != 0, killed.output
    assert killed.left == [], killed.output
    assert killed.seconds < BOUND_SECONDS
    assert not list(tmp_path.glob("result*")), "the fault has happened"
    folder = tmp_path / "checkpoints"
    for path in folder.glob("*.ckpt"):
        assert SavedCheckpoint(path).problems() == [], "what has a checkpoint's name is one"

    resumed = run(tmp_path, 2, *fixed, "--resume", "last", script=SCRIPT)
    assert resumed.code == 0, resumed.output
    results = [torch.load(tmp_path / f"result{r}.pt", weights_only=True) for r in range(2)]
    whole = ranks2.call(jobs.run, layout, workers=workers)
    assert_goes_on(results, whole, step)
    assert {p.name for p in folder.iterdir()} == {"last.ckpt", *(f"step={s}.ckpt" for s in range(2, LAST + 1, 2))}
