"""Whole runs with one fault: the cause is shown once, the rank is named, and within 15 s no process is left."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.faults.inject import MESSAGE
from tests.faults.launch import Launcher, Outcome, run
from tests.pairwise import slow

BOUND_SECONDS = 15.0
TIMEOUT_SECONDS = 5.0
"""How long collectives wait in a run in which a rank hangs; the others cannot know before."""

TRACEBACK = "Traceback (most recent call last)"
ERROR = r"lightning_hybrid.*RankError: "


def _check_end(outcome: Outcome, bound: float = BOUND_SECONDS) -> None:
    assert not outcome.left, outcome.output
    assert outcome.code != 0, outcome.output
    assert outcome.seconds < bound, outcome.output


def _own_traces(outcome: Outcome) -> int:
    """Tracebacks of ranks; torchrun adds one of its own."""
    return outcome.output.count(TRACEBACK) - len(
        re.findall(r"ChildFailedError: *$|SignalException: ", outcome.output, re.M)
    )


def _seen(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"seen{rank}.json").read_text())


@pytest.mark.parametrize(
    ("layout", "devices", "rank", "place", "step", "launcher"),
    [
        slow("dp2", 2, 0, "callback", 5, "warm"),
        ("pp2", 2, 1, "training_step", 5, "warm"),
        ("dp2", 2, 1, "worker", 57, "warm"),
        slow("dp2", 2, 1, "setup", None, "warm"),
        slow("pp2", 2, 0, "training_step", 5, "warm"),
        slow("pp2", 2, 1, "callback", 5, "warm"),
        slow("dp2", 2, 0, "training_step", 5, "torchrun"),
        slow("dp2", 2, 1, "callback", 5, "torchrun"),
        slow("pp2", 2, 0, "validation_step", 1, "warm"),
        slow("dp2", 2, 1, "teardown", None, "warm"),
        slow("dp2", 2, 0, "teardown", None, "torchrun"),
        slow("dp2-pp2", 4, 3, "training_step", 5, "warm"),
        slow("tp2-pp2", 4, 0, "callback", 5, "warm"),
        slow("fsdp2-pp2", 4, 2, "worker", 50, "torchrun"),
    ],
)
def test_exception(
    layout: str, devices: int, rank: int, place: str, step: int | None, launcher: Launcher, tmp_path: Path
) -> None:
    """Shown by its rank with its own traceback, and nothing else; callbacks hear of it on all ranks that can."""
    at = () if step is None else ("--step", str(step))
    where = ("--layout", layout, "--kind", "exception", "--rank", str(rank), "--place", place)
    outcome = run(tmp_path, devices, *where, *at, launcher=launcher)
    _check_end(outcome)
    ends = re.findall(rf"InjectedError: {MESSAGE}$", outcome.output, re.M)
    assert len(ends) == 1, outcome.output
    # a worker's traceback stands inside of its rank's
    assert _own_traces(outcome) == (2 if place == "worker" else 1), outcome.output
    assert f"[rank{rank}]: " in outcome.output
    if place not in ("setup", "teardown"):
        assert _seen(tmp_path, rank)["exception"] == "InjectedError"


@pytest.mark.parametrize(
    ("layout", "devices", "rank", "launcher"),
    [
        slow("dp2", 2, 1, "warm"),
        ("pp2", 2, 0, "warm"),
        slow("pp2", 2, 1, "torchrun"),
        slow("dp2", 2, 0, "torchrun"),
        slow("tp2-pp2", 4, 2, "warm"),
        slow("dp2-pp2", 4, 0, "warm"),
    ],
)
def test_killed(layout: str, devices: int, rank: int, launcher: Launcher, tmp_path: Path) -> None:
    """SIGKILL in the middle of a step: another rank names it, with the step."""
    fault = ("--kind", "kill", "--rank", str(rank), "--step", "7", "--place", "training_step")
    outcome = run(tmp_path, devices, "--layout", layout, *fault, launcher=launcher)
    _check_end(outcome)
    found = re.findall(rf"{ERROR}(Rank (\d) of \d ended without a word.*)", outcome.output)
    assert [f[1] for f in found] == [str(rank)], outcome.output
    assert "of batch 7" in found[0][0]
    assert _own_traces(outcome) <= 1, outcome.output
    assert "Connection closed" not in outcome.output


@pytest.mark.parametrize(
    ("kind", "layout", "devices", "rank"),
    [
        ("hang", "dp2", 2, 1),
        slow("stop", "pp2", 2, 1),
        slow("stop", "pp2", 2, 0),
        slow("hang", "pp2", 2, 0),
        slow("hang", "dp2-pp2", 4, 2),
    ],
)
def test_hang(kind: str, layout: str, devices: int, rank: int, tmp_path: Path) -> None:
    """Named with the place in the user's code, or as stopped; ended, although it cannot end itself."""
    fault = ("--kind", kind, "--rank", str(rank), "--step", "7", "--place", "training_step")
    # a connection between two stages keeps the time-out it was made with
    waiting, seconds = ("--timeout", 20.0) if "pp" in layout else ("--patience", TIMEOUT_SECONDS)
    outcome = run(tmp_path, devices, "--layout", layout, *fault, waiting, str(seconds))
    _check_end(outcome, seconds + BOUND_SECONDS)
    (said,) = re.findall(rf"{ERROR}(Rank {rank} of .*)", outcome.output)
    assert "of batch 7" in said
    if kind == "hang":
        assert re.search(r"hangs in training_step of batch 7 .*inject\.py:\d+ \(_happen\)", said), said
    else:
        assert "stopped (SIGSTOP)" in said
    assert len(re.findall(ERROR, outcome.output)) == 1, outcome.output


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(folder, 2, "--layout", "pp2")
    assert outcome.code == 0, outcome.output
    return json.loads((folder / "end.json").read_text())


@pytest.mark.parametrize(
    ("kind", "rank", "launcher"),
    [
        ("sigterm", 1, "warm"),
        slow("sigterm-launcher", 1, "torchrun"),
        slow("sigterm", 0, "warm"),
        slow("sigterm-launcher", 1, "warm"),
        slow("sigterm", 0, "torchrun"),
    ],
)
def test_sigterm_in_a_pipeline_step(
    kind: str, rank: int, launcher: Launcher, whole_run: dict[str, Any], tmp_path: Path
) -> None:
    """All ranks end the batch, stop at the same one, save together; the run goes on from there to the same end."""
    fault = ("--kind", kind, "--rank", str(rank), "--step", "7", "--place", "training_step", "--save")
    outcome = run(tmp_path, 2, "--layout", "pp2", *fault, launcher=launcher)
    assert not outcome.left
    assert outcome.seconds < BOUND_SECONDS
    assert _own_traces(outcome) == 0, outcome.output
    assert outcome.code == 0 or launcher == "torchrun", outcome.output
    assert [_seen(tmp_path, r) for r in (0, 1)] == [{"batches": 8, "exception": "SIGTERMException"}] * 2
    for file in tmp_path.glob("pid*"):
        file.unlink()
    resumed = run(tmp_path, 2, "--layout", "pp2", "--resume")
    assert resumed.code == 0, resumed.output
    assert json.loads((tmp_path / "end.json").read_text()) == whole_run


@pytest.mark.slow
def test_sigterm_in_validation(tmp_path: Path) -> None:
    fault = ("--kind", "sigterm", "--rank", "1", "--step", "2", "--place", "validation_step")
    outcome = run(tmp_path, 2, "--layout", "pp2", *fault)
    assert outcome.code == 0, outcome.output
    assert not outcome.left
    assert [_seen(tmp_path, r)["exception"] for r in (0, 1)] == ["SIGTERMException"] * 2


def test_no_save_alone(tmp_path: Path) -> None:
    """A callback that saves on an exception: the failing rank does not wait for the others, and says so."""
    fault = ("--kind", "exception", "--rank", "1", "--step", "7", "--save")
    outcome = run(tmp_path, 2, "--layout", "dp2", *fault)
    _check_end(outcome)
    assert outcome.output.count("is not saved: a checkpoint needs all ranks") == 1, outcome.output
    assert outcome.output.count(f"InjectedError: {MESSAGE}\n") >= 1
    assert not list(tmp_path.glob("saved/*"))


@pytest.mark.parametrize("launcher", ["warm", slow("lightning"), slow("torchrun")])
def test_launcher_is_killed(launcher: Launcher, tmp_path: Path) -> None:
    """Children end although nobody is left to end them."""
    outcome = run(
        tmp_path, 2, "--layout", "dp2", "--kind", "kill-launcher", "--rank", "1", "--step", "7", launcher=launcher
    )
    _check_end(outcome)
    # torchrun is no rank, so that a short run may have come to its end before
    assert len(re.findall(ERROR, outcome.output)) == 1 or launcher == "torchrun", outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_exits(rank: int, tmp_path: Path) -> None:
    """`sys.exit` on one rank shows nothing by itself."""
    outcome = run(tmp_path, 2, "--layout", "dp2", "--kind", "exit", "--rank", str(rank), "--step", "7")
    _check_end(outcome)
    said = rf"{ERROR}Rank {rank} of 2 failed after backward of batch 6 .*SystemExit: 3"  # as batch 7 begins
    assert len(re.findall(said, outcome.output)) == 1, outcome.output


def test_missing_rank(tmp_path: Path) -> None:
    fault = ("--kind", "hang", "--place", "start", "--rank", "1")
    outcome = run(tmp_path, 2, "--layout", "dp2", *fault, "--timeout", "10")
    _check_end(outcome, 40.0)
    assert outcome.output.count("rank 1 has not come within 0:00:10") == 1, outcome.output


@pytest.mark.slow
def test_rank_that_ends_before_the_meeting(tmp_path: Path) -> None:
    outcome = run(tmp_path, 2, "--layout", "dp2", "--kind", "exception", "--place", "start", "--rank", "1")
    _check_end(outcome)
    assert outcome.output.count("injected fault before the Trainer\n") == 1
    assert outcome.output.count("local rank 1") == 1, outcome.output


@pytest.mark.parametrize(
    ("differs", "patterns"),
    [
        slow("schedule", [r"`schedule` of the strategy is 1F1B on rank 0 and GPipe on rank 1"]),
        ("width", [r"Parameter `\w*stem.weight` is \(16, 16\).* on rank 0 and \(24, 16\).* on rank 1"]),
    ],
)
def test_different_program(differs: str, patterns: list[str], tmp_path: Path) -> None:
    outcome = run(tmp_path, 2, "--layout", "pp2", "--rank", "1", "--differs", differs)
    _check_end(outcome, 40.0)
    for pattern in patterns:
        assert len(re.findall(pattern, outcome.output)) == 1, outcome.output
    assert _own_traces(outcome) == 1
