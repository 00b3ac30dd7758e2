"""Starts scripts, from the command line or in processes that have everything imported already.

A process needs four seconds of processor time to import torch, Lightning and this package. `run_python` starts scripts
as users do, for tests of the start itself. The processes of `run_warm` are those that Lightning's launcher makes, with
the same parents: the one that runs the script first, and as its children one for each further rank; but they are
forked, from the server of the rank groups and from the first process before the script begins.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.harness import fork_server, free_port

LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What launchers and runs of one process leave in the environment; a script that inherits it would join that run."""


def script_environment() -> dict[str, str]:
    """The environment of a script that a test starts: as a user's, with the project on the path and no run in it."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    root = str(Path(__file__).parents[1])
    return kept | {"PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run_python(*command: str, timeout_seconds: float, cwd: Path | None = None) -> tuple[int, str]:
    """Runs Python with a clean environment, in a session of its own.

    Returns:
        The exit code and all output.

    Raises:
        TimeoutError: If it takes longer; all its processes are ended.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        raise TimeoutError(f"no end within {timeout_seconds:.0f} s; output:\n{output}") from None
    return process.returncode, output


class WarmProcess:
    """The first process of a script, in a session of its own.

    Args:
        command: What follows `python` on a command line: a script or `-m` and a module, and arguments.
        processes: Number of ranks, at most, that Lightning's launcher starts on this machine, the first one included.
        output: A file for all that the processes write.
        folder: The working directory; None: the present one.
    """

    def __init__(self, command: Sequence[str], processes: int, output: Path, folder: Path | None = None) -> None:
        environment = script_environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        arguments = (list(command), processes, environment, str(output), str(folder or Path.cwd()))
        self._process: Any = fork_server().Process(target=_main, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, if the process has ended; that of a signal is negative."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits for the end, for so long at most."""
        self._process.join(seconds)
        return self.poll()

    def kill(self) -> None:
        """Ends the process."""
        self._process.kill()


def run_warm(
    *command: str, processes: int, timeout_seconds: float, cwd: Path, output: str = "output"
) -> tuple[int, str]:
    """As `run_python`, on `processes` ranks; what they write is in the file `output` of the folder, too.

    Raises:
        TimeoutError: If it takes longer; all its processes are ended.
    """
    file = cwd / output
    process = WarmProcess(command, processes, file, cwd)
    code = process.wait(timeout_seconds)
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise TimeoutError(f"no end within {timeout_seconds:.0f} s; output:\n{file.read_text(errors='replace')}")
    return code, file.read_text(errors="replace")


# ---- in the processes


def _main(command: list[str], processes: int, environment: dict[str, str], output: str, folder: str) -> None:
    from lightning.pytorch.strategies.launchers import subprocess_script

    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    children = [_Child() for _ in range(processes - 1)]
    subprocess_script.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=lambda command, env, cwd: children.pop(0).start(command, env)
    )
    os._exit(_run(command, environment))


class _Child(subprocess.Popen):
    """A process that waits for a command line to run; to its parent, what `subprocess.Popen` would be."""

    def __init__(self) -> None:
        read, self._write = os.pipe()
        self.pid, self.returncode, self.args = os.fork(), None, ()
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock, self._sigint_wait_secs, self._child_created = threading.Lock(), 0.25, True
        if self.pid == 0:
            os.close(self._write)
            with os.fdopen(read, "rb") as pipe:
                try:
                    request = pickle.load(pipe)
                except EOFError:  # its parent has ended without a use for it
                    os._exit(0)
            os._exit(_run(*request))
        os.close(read)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> _Child:
        """Runs a command line of Python."""
        self.args = command
        with os.fdopen(self._write, "wb") as pipe:
            pickle.dump((list(command[1:]), dict(environment)), pipe)
        return self


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Runs a script as the interpreter does; the exit code."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    multiprocessing.set_start_method(None, force=True)  # workers start as those of a command line, not as this process
    code: Any = 0
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0
