"""A fault in each phase of a change of layout: the run ends and its checkpoints are intact, or it stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_hybrid.checkpoint.reader import SavedCheckpoint
from tests.faults.launch import Outcome, run
from tests.pairwise import slow

SCRIPT = Path(__file__).with_name("relayout_script.py")
BOUND_SECONDS = 15.0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of a run without a fault."""
    folder = tmp_path_factory.mktemp("plain")
    outcome = run(folder, 2, script=SCRIPT)
    assert outcome.code == 0, outcome.output
    end = json.loads((folder / "end.json").read_text())
    assert end["layout"] == "pp2"
    return end


@pytest.mark.parametrize(
    ("phase", "kind", "rank", "before", "after"),
    [
        ("plan", "exception", 1, "dp2", "pp2"),
        slow("plan", "memory", 0, "dp2", "pp2"),
        slow("plan", "exception", 0, "pp2", "tp2"),
        slow("plan", "exception", 1, "fsdp2", "pp2"),
        slow("memory", "exception", 1, "dp2", "pp2"),
        slow("memory", "memory", 0, "dp2", "pp2"),
        slow("move", "exception", 0, "dp2", "pp2"),
        slow("move", "memory", 1, "dp2", "pp2"),
        ("follow", "exception", 1, "dp2", "pp2"),
    ],
)
def test_training_stays_in_the_old_layout(
    tmp_path: Path, plain: dict[str, Any], phase: str, kind: str, rank: int, before: str, after: str
) -> None:
    arguments = ["--phase", phase, "--kind", kind, "--rank", str(rank), "--before", before, "--after", after]
    outcome = run(tmp_path, 2, *arguments, script=SCRIPT)
    assert outcome.code == 0, outcome.output
    end = json.loads((tmp_path / "end.json").read_text())
    assert end["layout"] == before
    assert "injected" in end["refused"]
    assert f"Training is in `layout='{before}'` as before" in end["refused"]
    assert end["steps"] == plain["steps"]
    assert end["sums"] == pytest.approx(plain["sums"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("phase", "kind", "rank"),
    [
        slow("detach", "exception", 0),
        slow("detach", "kill", 1),
        slow("plan", "kill", 1),
        slow("memory", "kill", 0),
        ("move", "kill", 1),
        slow("follow", "kill", 0),
    ],
)
def test_the_run_ends_and_goes_on_from_its_checkpoint(
    tmp_path: Path, plain: dict[str, Any], phase: str, kind: str, rank: int
) -> None:
    outcome = run(tmp_path, 2, "--phase", phase, "--kind", kind, "--rank", str(rank), script=SCRIPT)
    check_end(outcome, tmp_path, kind)
    resumed = run(tmp_path, 2, "--resume", script=SCRIPT)
    assert resumed.code == 0, resumed.output
    end = json.loads((tmp_path / "end.json").read_text())
    assert (end["steps"], end["layout"]) == (plain["steps"], "pp2"), "it changes its layout at the same step"
    assert end["sums"] == pytest.approx(plain["sums"], rel=1e-4, abs=1e-4)


def check_end(outcome: Outcome, folder: Path, kind: str) -> None:
    assert outcome.code != 0, outcome.output
    assert not outcome.left, outcome.output
    if kind != "memory":  # which notes no time
        assert outcome.seconds < BOUND_SECONDS, outcome.output
    assert (folder / "struck").exists()
    assert not (folder / "end.json").exists()
    saved = {p.name for p in (folder / "saved").iterdir()}
    assert saved == {"step=2.ckpt", "step=4.ckpt"}, "nothing is saved while weights move"
    for name in saved:
        assert SavedCheckpoint(folder / "saved" / name).problems() == []
