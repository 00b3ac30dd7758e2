"""Connects the processes of a run, identifies the process of each rank, and reads process states."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lightning_hybrid._torch_private import store_client
from lightning_hybrid.launch.failures import RankFailed
from lightning_hybrid.launch.terminal import said_later
from lightning_hybrid.spec.errors import RankError

State = Literal["running", "stopped", "gone"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""The default timeout of torch for gloo."""

_LOOK_SECONDS = 0.02
"""Seconds between a rank's polls for the other ranks; only during the start."""

_QUIET_SECONDS, _REPEAT_SECONDS = 10.0, 60.0
"""Seconds of waiting for other ranks before the first message, and between messages."""


@dataclass(frozen=True)
class Process:
    """The process of a rank."""

    host: str
    pid: int

    @property
    def is_local(self) -> bool:
        """True if the pid is valid here: the process is on this machine, in the same namespace of process ids."""
        return self.host == _this_host()

    def state(self) -> State:
        """Returns the state of the process, which must be on this machine."""
        return process_state(self.pid)


def this_process() -> Process:
    """Returns the process of this rank."""
    return Process(_this_host(), os.getpid())


def _this_host() -> str:
    """Returns the name of the machine, with the namespace of its process ids where there is one."""
    try:
        return f"{socket.gethostname()}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def process_state(pid: int) -> State:
    """Returns the state of a process of this machine; a zombie process counts as gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _state_without_proc(pid)
    return {"Z": "gone", "X": "gone", "T": "stopped"}.get(fields[0], "running")  # type: ignore[return-value]


def _state_without_proc(pid: int) -> State:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    return "running"


def exit_text(code: int) -> str:
    """Returns a return code of `subprocess` in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = "; if nobody killed it, the system did, for memory: see the kernel's log" if -code == signal.SIGKILL else ""
    return f"ended by signal {-code} ({name}{hint})"


# ---- rendezvous


@dataclass(frozen=True, kw_only=True)
class RankGroup:
    """The ranks of one run, after their rendezvous."""

    store: Store
    """This rank's own connection to the store, with keys of this run only."""
    rank: int
    processes: list[Process]
    facts: list[dict[str, str]]
    """The facts of each rank, by rank; see `facts_of`."""
    rank0_has_store: bool
    """True if the store ends with rank 0; otherwise an outer launcher hosts the store."""


def meet(
    environment: ClusterEnvironment,
    rank: int,
    world_size: int,
    timeout: timedelta | None,
    facts: dict[str, str],
    check: Callable[[], None],
) -> RankGroup:
    """Waits until all ranks have connected.

    Args:
        environment: Lightning's cluster environment, which knows the address of rank 0.
        rank: This rank.
        world_size: Number of ranks.
        timeout: The longest wait; None: `DEFAULT_TIMEOUT`.
        facts: This rank's facts, for all ranks.
        check: Called at every poll; raises if the run cannot start.

    Raises:
        RankError: If rank 0 cannot be reached; on the lowest rank present, if ranks are missing after `timeout`.
        RankFailed: On the other ranks present, if ranks are missing.
    """
    timeout = timeout or DEFAULT_TIMEOUT
    deadline = time.monotonic() + timeout.total_seconds()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    base = f"lightning_hybrid/watch/{attempt}"
    # other nodes wait for rank 0; on its own node its process is being started
    quiet = rank == 0 or environment.local_rank() > 0
    with nullcontext() if quiet else said_later(_waiting(rank, world_size, environment), _QUIET_SECONDS):
        store = PrefixStore(base, _connect(environment, rank, world_size, timeout))
    run = store.add(f"runs_of_rank/{rank}", 1)
    store = PrefixStore(str(run), store)
    own = this_process()
    store.set(f"here/{rank}", json.dumps({"host": own.host, "pid": own.pid, "facts": facts}))
    keys = [f"here/{r}" for r in range(world_size)]
    message_at = time.monotonic() + _QUIET_SECONDS
    while not store.check(keys):
        check()
        if time.monotonic() > message_at:
            message_at = time.monotonic() + _REPEAT_SECONDS
            _say_who_is_missing(store, rank, world_size, timeout)
        if time.monotonic() > deadline:
            raise _missing(store, rank, world_size, timeout)
        time.sleep(_LOOK_SECONDS)
    said: list[dict[str, Any]] = [json.loads(text) for text in store.multi_get(keys)]
    return RankGroup(
        store=store,
        rank=rank,
        processes=[Process(s["host"], s["pid"]) for s in said],
        facts=[s["facts"] for s in said],
        rank0_has_store=not _has_agent_store(),
    )


def _waiting(rank: int, world_size: int, environment: ClusterEnvironment) -> str:
    """Returns what a rank says while it connects, which torch does without a word."""
    place = f"{environment.main_address}:{environment.main_port} (MASTER_ADDR, MASTER_PORT)"
    return f"Rank {rank} of {world_size} waits for rank 0 at {place}."


def _say_who_is_missing(store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
    here, missing = _who_is_here(store, world_size)
    if rank != here[0] or not missing:
        return
    hosts = sorted({json.loads(store.get(f"here/{r}"))["host"].partition(":")[0] for r in here})
    print(  # noqa: T201 -- loggers are not set up yet
        f"Waiting for {_named(missing)}: {len(here)} of {world_size} ranks are here, on {', '.join(hosts)}. The run "
        f"ends if others do not come within {timeout} (the strategy's `timeout`).",
        file=sys.stderr,
        flush=True,
    )


def _who_is_here(store: Store, world_size: int) -> tuple[list[int], list[int]]:
    """Returns the ranks that have come, and those that are missing."""
    here = [r for r in range(world_size) if store.check([f"here/{r}"])]
    return here, sorted(set(range(world_size)) - set(here))


def _named(ranks: list[int]) -> str:
    """Returns `rank 2` or `ranks 2, 4-7`."""
    runs: list[list[int]] = []
    for r in ranks:
        if runs and runs[-1][-1] == r - 1:
            runs[-1].append(r)
        else:
            runs.append([r])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"


def _has_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(environment: ClusterEnvironment, rank: int, world_size: int, timeout: timedelta) -> Store:
    if dist.is_initialized():
        return store_client()
    address, port = environment.main_address, environment.main_port
    try:
        return TCPStore(  # the store of the process group comes later and shares the server
            address,
            port,
            world_size,
            rank == 0 and not _has_agent_store(),
            timeout,
            wait_for_workers=False,
            multi_tenant=not _has_agent_store(),
        )
    except dist.DistNetworkError as error:  # type: ignore[attr-defined]
        raise RankError(
            f"Rank {rank} of {world_size} cannot reach rank 0 at {address}:{port} ({_first_line(error)}). Rank 0 has "
            "not started, or MASTER_ADDR and MASTER_PORT are not its own, or a firewall is between them."
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].strip(" .") if str(error) else type(error).__name__


def _missing(store: Store, rank: int, world_size: int, timeout: timedelta) -> BaseException:
    here, missing = _who_is_here(store, world_size)
    have = "has" if len(missing) == 1 else "have"
    message = (
        f"The run cannot start: {_named(missing)} {have} not come within {timeout} (the strategy's `timeout`). Of "
        f"{world_size} ranks {len(here)} are here. See the output of the missing ones, and whether their machines can "
        "reach rank 0."
    )
    return RankError(message) if rank == here[0] else RankFailed(message)
