"""Starts a group of gloo ranks once and sends it calls, so that a distributed test costs a call, not a process start.

A `RankGroup` owns `world_size` processes on this machine. `RankGroup.call(function, *args)` runs one picklable function
on all of them and returns every rank's result. The environment of the ranks is the one that a launcher outside
Lightning would set, so Lightning's own cluster environment finds them; the process group is made by the strategy inside
the first call and stays for the calls that follow.

A call that takes longer than its time-out has hung: the stacks of all ranks are put into the error. Where all ranks
report an error, as with a refused layout, and meet at a barrier afterwards, they serve the next call. After any other
error they may be out of step with each other, so they are ended, by process id, and the next call starts new ones. They
are forked from a server that has torch, Lightning and this package imported already.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from _pytest.config import parse_warning_filter

PRELOADED_MODULES = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torchmetrics",
    "lightning.pytorch",
    "lightning_hybrid",
    "transformers.models.llama.modeling_llama",
    "tests.distributed.jobs",
)
"""Imported once, by the server that the ranks are forked from."""

SECONDARY_ERROR = re.compile(
    r"time[d ]*-? ?out|connection (was )?(closed|reset|refused|aborted)|broken pipe", re.IGNORECASE
)
"""What the peers of a failed rank report: never the cause."""

GRACE_SECONDS = 2.0
"""How long the other ranks may take to report after the first error; empirical."""

BARRIER_SECONDS = 2.0
"""How long ranks may take to meet after an error; empirical."""

_ENDED = ("Hang", "Exit")
"""Kinds of failures after which a rank does not answer."""

LOG_TAIL_CHARACTERS = 6000

warning_filters: list[str] = []
"""Those of pytest's configuration, which the ranks apply, too."""


@dataclass(frozen=True)
class RankFailure:
    """What went wrong on one rank."""

    rank: int
    kind: str
    """Name of the exception's class, or `"Hang"` or `"Exit"`."""
    message: str
    traceback: str

    @property
    def is_secondary(self) -> bool:
        """Whether this is only the echo of another rank's failure, or a quiet end because another rank reports."""
        quiet = self.kind in ("Hang", "SystemExit", "RankFailed")
        ended = self.kind == "Exit" and " code 1 " in self.message
        return quiet or ended or bool(SECONDARY_ERROR.search(f"{self.kind}: {self.message}"))


class RankError(RuntimeError):
    """A call failed on at least one rank; shows the first failure that is not a time-out or a closed connection."""

    def __init__(self, failures: list[RankFailure], world_size: int, log: str = "") -> None:
        primary = [failure for failure in failures if not failure.is_secondary]
        self.failures = failures
        self.failure = (primary or failures)[0]
        self.kind = self.failure.kind
        ranks = ", ".join(str(failure.rank) for failure in failures)
        text = (
            f"rank {self.failure.rank} of {world_size}: {self.kind}: {self.failure.message}\n"
            f"(failed: rank {ranks})\n{self.failure.traceback}"
        )
        super().__init__(text + (f"\n--- output of the rank ---\n{log}" if log else ""))


def fork_server() -> Any:
    """The context that forks processes from one that has the `PRELOADED_MODULES`."""
    # The server finds this package and the tests by the environment, however this process was started.
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED_MODULES))
    return context


class RankGroup:
    """Processes 0 to `world_size` - 1 of one process group on this machine.

    Args:
        world_size: Number of processes.
        timeout_seconds: How long a call may take unless it says otherwise.
    """

    def __init__(self, world_size: int, *, timeout_seconds: float = 60.0) -> None:
        if world_size < 1:
            raise ValueError(f"`world_size` must be at least 1. Got {world_size}.")
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._logs: Path | None = None

    def __enter__(self) -> RankGroup:
        """Start nothing yet: the first call does."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the ranks."""
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks that run now."""
        return [process.pid for process in self._processes if process.is_alive()]

    def call(
        self, function: Callable[..., Any], *args: Any, timeout_seconds: float | None = None, **kwargs: Any
    ) -> list[Any]:
        """Run `function(*args, **kwargs)` on every rank.

        Args:
            function: A function that can be imported by name in another process.
            *args: Picklable positional arguments, the same for all ranks.
            timeout_seconds: Longest time the call may take, process start not counted.
            **kwargs: Picklable keyword arguments, the same for all ranks.

        Returns:
            The results in order of rank.

        Raises:
            RankError: The call raised, died or hung on a rank.
        """
        if len(self.pids) < self.world_size:
            self.close(graceful=False)
            self._start()
        payload = pickle.dumps((function, args, kwargs))
        for connection in self._connections:
            connection.send_bytes(payload)
        results, failures = self._collect(self.timeout_seconds if timeout_seconds is None else timeout_seconds)
        if failures:
            log = self._log_tail(RankError(failures, self.world_size).failure.rank)
            if not self._can_continue(failures):
                self.close(graceful=False)
            raise RankError(failures, self.world_size, log)
        return [results[rank] for rank in range(self.world_size)]

    def _can_continue(self, failures: list[RankFailure]) -> bool:
        """Whether every rank has come back with an error, and all meet at a barrier."""
        if {f.rank for f in failures} != set(range(self.world_size)) or any(f.kind in _ENDED for f in failures):
            return False
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((_meet, (), {})))
        met, missing = self._collect(BARRIER_SECONDS + 1, hangs=False)
        return not missing and len(met) == self.world_size

    def output(self, rank: int) -> str:
        """All that the rank has written to stdout and stderr since it was started."""
        return (self._logs / f"{rank}.log").read_text(errors="replace") if self._logs is not None else ""

    def close(self, *, graceful: bool = True) -> None:
        """End all ranks and wait for them; a new call starts new ones."""
        if graceful:
            for process, connection in zip(self._processes, self._connections, strict=True):
                if process.is_alive():
                    connection.send_bytes(pickle.dumps(None))
            for process in self._processes:
                process.join(GRACE_SECONDS)
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._logs is not None:
            shutil.rmtree(self._logs, ignore_errors=True)
            self._logs = None

    def _start(self) -> None:
        context = fork_server()
        self._logs = Path(tempfile.mkdtemp(prefix="ranks-"))
        port = free_port()
        for rank in range(self.world_size):
            (self._logs / f"{rank}.log").touch()
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world_size, port, theirs, str(self._logs / f"{rank}.log"), warning_filters),
                name=f"rank{rank}of{self.world_size}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self, timeout_seconds: float, *, hangs: bool = True) -> tuple[dict[int, Any], list[RankFailure]]:
        """Wait for a report of every rank; after a failure only for as long as its cause may take to show.

        With `hangs` ranks that do not report are failures, if there is no other.
        """
        results: dict[int, Any] = {}
        failures: list[RankFailure] = []
        waiting = dict(enumerate(self._connections))
        deadline = time.monotonic() + timeout_seconds
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            ready = wait(list(waiting.values()), timeout=remaining)
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                failure, value = self._receive(rank, waiting.pop(rank))
                if failure is None:
                    results[rank] = value
                    continue
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                failures.append(failure)
        if hangs and waiting and not failures:
            failures = [self._hang(rank, timeout_seconds) for rank in waiting]
        return results, failures

    def _receive(self, rank: int, connection: Connection) -> tuple[RankFailure | None, Any]:
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join(GRACE_SECONDS)
            code = self._processes[rank].exitcode
            return RankFailure(rank, "Exit", f"the process ended with exit code {code} during the call", ""), None

    def _hang(self, rank: int, timeout_seconds: float) -> RankFailure:
        """Have the rank write the stacks of all its threads into its log, and read them there."""
        before = len(self.output(rank))
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        stacks = self.output(rank)[before:]
        return RankFailure(rank, "Hang", f"no result within {timeout_seconds:.0f} s", stacks)

    def _log_tail(self, rank: int) -> str:
        return self.output(rank)[-LOG_TAIL_CHARACTERS:]


def start_fake_ranks(size: int) -> None:
    """Makes this process rank 0 of a process group whose other ranks do not exist; its collectives do nothing."""
    from torch.distributed import init_process_group
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", rank=0, world_size=size, store=FakeStore())


def _meet() -> None:
    """Waits for the other ranks at a barrier, if the ranks have a process group."""
    from datetime import timedelta

    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier(async_op=True).wait(timedelta(seconds=BARRIER_SECONDS))  # type: ignore[union-attr]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(
    rank: int, world_size: int, port: int, connection: Connection, log_path: str, filters: Sequence[str]
) -> None:
    """Body of a rank: run calls until told to stop."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()

    import torch

    torch.set_num_threads(1)
    _share_gloo_device()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] -- loaders start workers
    multiprocessing.set_start_method(None, force=True)  # which workers have by default, not that of this process
    while (request := pickle.loads(connection.recv_bytes())) is not None:
        with warnings.catch_warnings():
            for text in filters:
                warnings.filterwarnings(*parse_warning_filter(text, escape=False))
            reply = _run(rank, world_size, *request)
        connection.send_bytes(reply)
    # The process group is not torn down in step with the other ranks, so interpreter shutdown could wait for them.
    os._exit(0)


def _share_gloo_device() -> None:
    """Makes all process groups of this process use one gloo device.

    By default each group has its own, whose thread polls 100 times a second. A rank of a pool keeps the groups of every
    layout that it has run, and these threads used half of the machine's CPU time.
    """
    from torch.distributed import distributed_c10d as c10d

    gloo: Any = c10d.ProcessGroupGloo
    devices: list[Any] = []

    class Kind(type(gloo)):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, gloo)

    class SharedGloo(gloo, metaclass=Kind):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any, **_: Any) -> None:  # torch 2.14 has more
            if not devices:
                devices.append(gloo.create_device(interface="lo"))
            options = gloo._Options()
            options._devices, options._threads, options._timeout = devices, 2, timeout
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = SharedGloo


def _run(rank: int, world_size: int, function: Callable[..., Any], args: tuple, kwargs: dict) -> bytes:
    """Run one call; a report of any outcome must reach the parent, hence the widest possible except."""
    # Lightning deletes `WORLD_SIZE` from the environment when a strategy is torn down.
    os.environ["WORLD_SIZE"] = str(world_size)
    sys.excepthook = sys.__excepthook__  # the strategies of earlier calls are done with
    try:
        return pickle.dumps((None, function(*args, **kwargs)))
    except BaseException as error:
        failure = RankFailure(rank, type(error).__name__, str(error), traceback.format_exc())
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)  # by which the strategy sees that it is shown
        return pickle.dumps((failure, None))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
