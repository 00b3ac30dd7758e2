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

from tests.harness import free_port
from tests.scripts import WarmProcess, script_environment

SCRIPT = Path(__file__).with_name("script.py")
LIMIT_SECONDS = 90.0

Launcher = Literal["warm", "lightning", "torchrun"]
"""Lightning's launcher in processes with everything imported, the same from a command line, or torchrun."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    output: str
    seconds: float
    """From the fault, or else from the start, to the end of the last process."""
    left: list[int]
    """Processes that were still there long after; they have been ended."""


def run(folder: Path, devices: int, *arguments: str, launcher: Launcher = "warm", script: Path = SCRIPT) -> Outcome:
    """Runs a script and waits for all its processes.

    Args:
        folder: For the files of the ranks; the script gets it as `--out`.
        devices: Number of ranks.
        *arguments: Of the script.
        launcher: See `Launcher`.
        script: The script.
    """
    command = [str(script), "--out", str(folder), *arguments]
    (folder / "output").unlink(missing_ok=True)
    start = time.time()
    if launcher == "warm":
        process = WarmProcess(command, devices, folder / "output")
    else:
        process = _cold(command, devices, launcher, folder / "output")
    code, left = _wait(process, folder)
    note = folder / "struck"
    since = float(note.read_text()) if note.exists() else start
    return Outcome(code, (folder / "output").read_text(errors="replace"), time.time() - since, left)


def _cold(command: list[str], devices: int, launcher: Launcher, file: Path) -> subprocess.Popen:
    environment = script_environment()
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(devices), "--standalone", *command]
    else:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with file.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(process: subprocess.Popen | WarmProcess, folder: Path) -> tuple[int, list[int]]:
    """Waits for the main process and for all that have left their process id in the folder."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None and not _alive(folder):
            return code, []
        time.sleep(0.05)
    left = _alive(folder)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    return process.wait() or 0, left


def _alive(folder: Path) -> list[int]:
    pids = [int(file.read_text() or 0) for file in folder.glob("pid*")]
    return [pid for pid in pids if pid and _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
