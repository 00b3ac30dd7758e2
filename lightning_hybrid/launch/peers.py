"""Checks the processes of all ranks, and exchanges failures between ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from subprocess import Popen

from lightning_hybrid._torch_private import main_thread_location
from lightning_hybrid.launch.failures import Answer, Failure
from lightning_hybrid.launch.processes import RankGroup, State, exit_text
from lightning_hybrid.launch.store import FailureStore

POLL_SECONDS = 0.5
"""Seconds between polls."""
_SILENT_POLLS, _SILENT_POLLS_ALONE = 10, 120
"""Polls without a heartbeat after which a rank of another machine counts as ended: after a failure, otherwise."""


class PeerMonitor:
    """Collects the failures of all ranks, as one rank sees them.

    Args:
        group: The ranks of the run.
        children: The processes of the ranks that this process has started, local rank 1 first.
        operation: Returns the operation of the main thread.
    """

    def __init__(self, group: RankGroup, children: Sequence[Popen], operation: Callable[[], str]) -> None:
        self.group, self._children, self._operation = group, children, operation
        self.store = FailureStore(group.store, group.rank)
        self.progress = ""
        """How far the main thread has come, for ranks that wait for this one outside of a collective."""
        self._published = ""
        self.failures: list[Failure] = []
        self.first_seen = 0.0
        self.outbox: list[Failure] = []
        """Failures that this rank has not posted yet."""
        self.is_alone = False
        """True if the store is gone, so that this rank cannot reach the others."""
        self.is_first = False
        """True if no rank before this one was alive when this rank became alone; ranks elsewhere count as alive.

        Later, the first rank may have ended because it has reported the cause.
        """
        self._posted: set[tuple[int, bool]] = set()
        self._beats: dict[int, tuple[str, int]] = {}
        self._polls = 0
        self._has_left = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.group.processes)

    def states(self) -> dict[int, State]:
        """Returns the states of the other ranks' processes on this machine, by rank."""
        processes = enumerate(self.group.processes)
        return {r: process.state() for r, process in processes if process.is_local and r != self.group.rank}

    def poll(self) -> None:
        """Exchanges failures, and checks all processes once."""
        self._polls += 1
        states = self.states()
        host = states.get(0) if self.group.rank0_has_store else None
        if host == "gone" and self._has_left:
            return
        if self.is_alone or host == "stopped":  # a stopped store answers when its process continues, or never
            self._check_processes(states)
            self._note(self.outbox)
            self.outbox = []
        elif host == "gone":  # a request would make torch print a stack trace
            self.lose_store()
        else:
            try:
                self._exchange(states)
            except (RuntimeError, OSError):
                self.lose_store()

    def _exchange(self, states: dict[int, State]) -> None:
        store, before = self.store, bool(self.failures)
        store.beat(self._operation())
        if self.progress != self._published:
            self._published = self.progress
            store.note_progress(self._published)
        self._note(store.new_failures())  # first: a rank that has posted its failure is not missing
        self._check_processes(states)
        self._check_remote()
        while self.outbox:
            store.post(self.outbox[0])
            self.outbox.pop(0)
            self._note(store.new_failures())
        if self.failures and not before:
            where, waiting = main_thread_location()
            store.answer(Answer(operation=self._operation(), where=where, waiting=waiting))

    def everyone_knows(self) -> bool:
        """Returns True if all live ranks have read the cause."""
        return self.store.seen() >= self.world_size - len({f.rank for f in self.failures if f.kind == "ended"})

    def _note(self, failures: Sequence[Failure]) -> None:
        if failures and not self.failures:
            self.first_seen = time.monotonic()
        self.failures += failures

    def decide_alone(self) -> None:
        """Makes this rank decide alone from now on, because the store does not answer."""
        if not self.is_alone:
            processes = self.group.processes[: self.group.rank]
            self.is_first = all(p.is_local and p.state() != "running" for p in processes)
        self.is_alone = True

    def lose_store(self) -> None:
        """Makes this rank decide alone from now on, because the store is gone."""
        self.decide_alone()
        if self.group.rank0_has_store:
            self._ended(0, "its process is gone, and with it the store of the run")
        self._note(self.outbox)
        self.outbox = []

    def note_reported(self) -> None:
        """Notifies the other ranks that this rank has reported the cause, so that they can exit."""
        if not self.is_alone:
            with contextlib.suppress(RuntimeError, OSError):
                self.store.note_reported()

    def has_reported(self, reporter: int | None) -> bool:
        """Returns True if the cause has been reported, or can no longer be.

        Args:
            reporter: The rank that reports the cause; None: not known.
        """
        states = self.states()
        if reporter in states and states[reporter] == "gone":
            return True
        if self.is_alone:
            return False
        if self.group.rank0_has_store and states.get(0) == "gone":
            return True  # rank 0 exited after the report
        try:
            return self.store.is_reported()
        except (RuntimeError, OSError):
            return True

    def leave(self) -> bool:
        """Marks this rank's run as over; returns True once the runs of all ranks are over, or the store is gone."""
        try:
            if not self._has_left and not self.is_alone:
                self.store.leave()
                self._has_left = True
            return self.is_alone or all(self.store.has_left(r) for r in range(self.world_size))
        except (RuntimeError, OSError):
            return True  # rank 0 has seen all others leave, and is gone with the store

    # ---- other ranks

    def _check_processes(self, states: dict[int, State]) -> None:
        for rank, state in states.items():
            if state == "gone":
                self._ended(rank, f"its process (pid {self.group.processes[rank].pid}) is gone")
        for local_rank, child in enumerate(self._children, 1):
            code = child.poll()
            if code is not None:
                self._ended(self.group.rank + local_rank, f"its process (pid {child.pid}) {exit_text(code)}", sure=True)

    def _check_remote(self) -> None:
        """Checks the heartbeats of the ranks before and after this one, if they are on other machines."""
        for rank in {(self.group.rank + 1) % self.world_size, (self.group.rank - 1) % self.world_size}:
            if self.group.processes[rank].is_local:
                continue
            beat = f"{self.store.beat_of(rank)}"
            last, since = self._beats.get(rank, ("", self._polls))
            if beat != last:
                self._beats[rank] = (beat, self._polls)
                continue
            silent = self._polls - since
            if silent > (_SILENT_POLLS if self.failures else _SILENT_POLLS_ALONE):
                self._ended(rank, f"no sign of it for {silent * POLL_SECONDS:.0f} s")

    def _ended(self, rank: int, how: str, *, sure: bool = False) -> None:
        """Posts that a rank's process has ended, unless its run was over or the rank has posted a failure.

        Args:
            rank: The rank.
            how: How the process ended, as text.
            sure: True if the parent of the process posts, which adds the exit code to the failures posted by others.
        """
        if (rank, sure) in self._posted or any(f.rank == rank and f.kind != "ended" for f in self.failures):
            return
        operation = ""
        if not self.is_alone:
            if self.store.has_left(rank):
                return
            operation = self.store.beat_of(rank) or ""
        self._posted.add((rank, sure))
        self.outbox.append(Failure(rank=rank, kind="ended", text=how, operation=operation))
