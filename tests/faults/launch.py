"""Starts a script on several ranks, and measures how the run ends: exit code, output, seconds, processes left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.harness import free_port, script_environment

SCRIPT = Path(__file__).with_name("script.py")
LIMIT_SECONDS = 90.0

Launcher = Literal["lightning", "torchrun"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    output: str
    seconds: float
    """From the fault, or else from the start, to the end of the last process."""
    left: list[int]
    """Processes that were still there long after; they have been ended."""


def run(
    folder: Path, devices: int, *arguments: str, launcher: Launcher = "lightning", script: Path = SCRIPT
) -> Outcome:
    """Runs a script and waits for all its processes.

    Args:
        folder: For the files of the ranks; the script gets it as `--out`.
        devices: Number of ranks.
        *arguments: Of the script.
        launcher: Lightning's own, or torchrun.
        script: The script.
    """
    environment = script_environment()
    command = [sys.executable]
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(devices), "--standalone"]
    else:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    start = time.time()
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, str(script), "--out", str(folder), *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    code, left = _wait(process, folder)
    note = folder / "struck"
    since = float(note.read_text()) if note.exists() else start
    return Outcome(code, (folder / "output").read_text(errors="replace"), time.time() - since, left)


def _wait(process: subprocess.Popen, folder: Path) -> tuple[int, list[int]]:
    """Waits for the main process and for all that have left their process id in the folder."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        process.poll()
        if process.returncode is not None and not _alive(folder):
            return process.returncode, []
        time.sleep(0.05)
    left = _alive(folder)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    return process.wait(), left


def _alive(folder: Path) -> list[int]:
    pids = [int(file.read_text() or 0) for file in folder.glob("pid*")]
    return [pid for pid in pids if pid and _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
