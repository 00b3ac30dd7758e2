"""A thread beside each rank's main thread: it notices failures of any rank, finds the cause and ends what hangs.

The main thread notes what it is doing; the thread tells the others about once a second that the rank lives, and looks
whether they do. After a failure each rank learns the one cause. The rank that has caused it raises its own exception;
where it cannot, the first that can names it. All others leave quietly, by themselves if their main thread comes back
from the collective in which it waits, else by the end of the process.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from subprocess import Popen
from typing import Any, NoReturn

from lightning_hybrid._torch_private import main_thread_location
from lightning_hybrid.execute.board import Board
from lightning_hybrid.execute.failures import Answer, Cause, Failure, RankFailed, choose_cause, failure_of, is_ripe
from lightning_hybrid.execute.processes import Party, State, exit_text, process_state
from lightning_hybrid.spec.errors import RankError

_POLL_SECONDS = 0.5
_SILENT_POLLS, _SILENT_POLLS_ALONE = 10, 120
"""After so many polls without a sign a rank on another machine counts as ended: if a connection broke, and if not."""
_RETURN_SECONDS = 3.0
"""How long a quiet rank's main thread may take to come back from a collective; closed connections wake it at once."""
_SPEECH_SECONDS = 10.0
"""How long the rank with the cause may take for callbacks and loggers; all ranks are to end within 15 s."""
_PATIENCE_SECONDS = 12.0
"""How long a failing main thread waits for the decision; one with a dead store takes its own."""
_LAST_WORD_SECONDS = 3.0
"""How long a quiet rank stays for another to speak: launchers end all ranks as soon as the first one goes."""
_FINALIZE_SECONDS = 5.0


@dataclass
class _Incident:
    """All that this rank knows of the failures of a run."""

    failures: list[Failure] = field(default_factory=list)
    first_seen: float = 0.0
    cause: Cause | None = None
    decided_at: float = 0.0
    decided: threading.Event = field(default_factory=threading.Event)
    known_to_all: threading.Event = field(default_factory=threading.Event)
    speech: bool | None = None
    """Whether this rank shows a cause that has no speaker of its own; None: not asked."""


class Watch:
    """Watches over the runs of one strategy, one after another.

    Args:
        timeout: How long collectives wait, for the text of errors.
    """

    def __init__(self, timeout: object) -> None:
        self._timeout = timeout
        self._doing: tuple[str, int | None, int | None, bool] = ("start", None, None, False)
        self._party: Party | None = None
        self._board: Board | None = None
        self._thread: threading.Thread | None = None
        self._finished = threading.Event()
        self._raised: BaseException | None = None
        self._raising = self._in_failed = False
        self._incident = _Incident()
        self._guarded = False

    # ---- the main thread's side

    @contextmanager
    def during(self, operation: str, batch: int | None = None, step: int | None = None) -> Iterator[None]:
        """Notes what the main thread is doing; after an exception it still is."""
        self._doing = (operation, batch, step, False)
        yield
        self._doing = (operation, batch, step, True)

    @property
    def doing(self) -> str:
        """What the main thread is doing, in words."""
        operation, batch, step, over = self._doing
        at = "" if batch is None else f" of batch {batch}" + ("" if step is None else f" (global step {step})")
        return f"{'after ' if over else ''}{operation}{at}"

    @property
    def failing(self) -> bool:
        """Whether the ranks can no longer work together."""
        return self._raising and self._incident.cause is not None

    def begin(self, children: Sequence[Popen], main_pid: int | None, reap: Callable[[], None]) -> None:
        """Starts to watch.

        Args:
            children: Ranks that this process has started, local rank 1 first.
            main_pid: The process that has started this one, if its end ends the run.
            reap: Ends the children.
        """
        self._children, self._main_pid, self._reap = children, main_pid, reap
        self._incident, self._outbox = _Incident(), list[Failure]()
        self._wake, self._finished = threading.Event(), threading.Event()
        self._party, self._board, self._raised = None, None, None
        self._raising = self._in_failed = False
        self._store_lost, self._told, self._polls = False, set[int](), 0
        self._beats: dict[int, tuple[str | None, int]] = {}
        self._doing = ("start", None, None, False)
        if not self._guarded:
            self._guarded = True
            atexit.register(self._at_exit)
            self._hook_exceptions()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def connect(self, party: Party) -> None:
        """From now on this rank tells the others, and looks at them."""
        self._party = party
        self._board = Board(party.store, party.rank)

    def check_children(self) -> None:
        """Raises if a rank that this process has started has ended before all ranks have met."""
        for local_rank, child in enumerate(self._children, 1):
            code = child.poll()
            if code is not None:
                raise RankError(
                    f"The run cannot start: the process of local rank {local_rank} (pid {child.pid}) has ended before "
                    f"the ranks met, {exit_text(code)}. What it says of the reason stands above, if it could say any."
                )

    def failed(self, error: BaseException) -> BaseException | None:
        """Tells the others of an exception, and finds out whose it is to be shown.

        Returns:
            What to raise in its place; None: the exception itself.
        """
        self._raised, self._raising = error, True
        party = self._party
        if party is None or self._thread is None or isinstance(error, RankFailed):
            return None
        self._in_failed = True
        self._outbox.append(failure_of(error, party.rank, self.doing))
        self._wake.set()
        if not self._incident.decided.wait(_PATIENCE_SECONDS):
            self._accept(self._choose({}))
        cause = self._incident.cause
        if cause is None:
            return None
        if party.rank == 0 and party.rank0_has_store:
            self._incident.known_to_all.wait(_LAST_WORD_SECONDS)  # the store ends with this process
        if isinstance(error, KeyboardInterrupt | SystemExit):
            if cause.rank == party.rank and len({f.rank for f in self._incident.failures}) < len(party.processes):
                _say(cause.text)  # these show nothing by themselves
            return None
        if cause.speaker == party.rank:
            return None
        if cause.speaker is None and self._incident.speech:
            self._end_stopped()
            return RankError(cause.text)
        self._wait_for_speaker(cause)
        return RankFailed(cause.text)

    def note_unsaved(self, path: object) -> None:
        """Says, once, that a callback's checkpoint is not saved."""
        cause = self._incident.cause
        if cause is not None and self._speaks(cause):
            warnings.warn(
                f"{path} is not saved: a checkpoint needs all ranks, and the run has failed. {cause.text}",
                RuntimeWarning,
                stacklevel=2,
            )

    def interrupted(self) -> None:
        """Notes that all ranks raise an exception together, to stop."""
        self._raising = True

    def torn_down(self) -> None:
        """The strategy's part is over; if that was because of an exception, so is the run."""
        if self._raising:
            self.finish()

    def finish(self) -> None:
        """Ends watching; a rank that ends from now on is no failure."""
        if self._thread is None:
            return
        self._finished.set()
        self._wake.set()
        self._thread.join(_LAST_WORD_SECONDS)
        if self._board is not None and not self._store_lost and not self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._board.leave()
        self._thread = self._raised = None

    def _wait_for_speaker(self, cause: Cause) -> None:
        known = self._party is not None and cause.speaker is not None
        speaker = self._party.processes[cause.speaker] if known else None  # type: ignore[union-attr, index]
        deadline = time.monotonic() + _LAST_WORD_SECONDS
        while time.monotonic() < deadline:
            if speaker is not None and speaker.is_local and speaker.state() == "gone":
                return
            time.sleep(0.05)

    # ---- the end of the process

    def _hook_exceptions(self) -> None:
        """Exceptions that reach the top come here: from `on_exception` and teardown they pass no other seam."""
        previous = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            shown: BaseException | None = error
            cause = self._incident.cause
            if self._thread is not None and cause is None:
                replacement = self.failed(error)
                shown = None if isinstance(replacement, RankFailed) else (replacement or error)
            elif cause is not None and not isinstance(error, RankError) and not self._speaks(cause):
                shown = None
            if shown is error:
                previous(kind, error, trace)
            elif shown is not None:
                previous(type(shown), shown, None)

        sys.excepthook = hook

    def _speaks(self, cause: Cause) -> bool:
        return self._party is None or cause.speaker == self._party.rank or bool(self._incident.speech)

    def _at_exit(self) -> None:
        if self.failing:
            # process groups with open requests may wait for each other for ever in their destructors
            faulthandler.dump_traceback_later(_FINALIZE_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        elif self._party is not None and self._party.rank == 0 and self._party.rank0_has_store:
            self._outlast_others(self._party)

    def _outlast_others(self, party: Party) -> None:
        """The store ends with this process: it stays until the others have left."""
        board = Board(party.store, party.rank)
        deadline = time.monotonic() + 60.0
        with contextlib.suppress(RuntimeError):
            for rank, process in enumerate(party.processes):
                while not board.has_left(rank) and not (process.is_local and process.state() == "gone"):
                    if time.monotonic() > deadline or self._thread is not None:
                        return
                    time.sleep(0.02)

    def _end_process(self) -> NoReturn:
        for child in multiprocessing.active_children():  # workers of data loaders, which may hang too
            child.kill()
        self._reap()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(1)

    def _end_stopped(self) -> None:
        """A stopped process cannot end itself."""
        if self._party is None:
            return
        for process in self._party.processes:
            if process.is_local and process.pid != os.getpid() and process.state() == "stopped":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    # ---- the thread

    def _run(self) -> None:
        while True:
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()
            if self._finished.is_set():
                return
            self._polls += 1
            if self._party is None:
                self._before_meeting()
                continue
            self._look(self._party)
            if self._incident.failures and self._incident.cause is None:
                self._try_to_decide(self._party)
            if self._incident.cause is not None:
                self._enforce(self._party, self._incident.cause)

    def _before_meeting(self) -> None:
        if self._main_pid is not None and process_state(self._main_pid) == "gone":
            if os.environ.get("LOCAL_RANK") == "1":
                _say("The run cannot start: the process that had started the ranks ended without a word.")
            self._end_process()

    def _look(self, party: Party) -> None:
        states = self._local_states(party)
        if self._board is None or self._store_lost or (party.rank0_has_store and states.get(0) == "stopped"):
            self._look_at_processes(party, states)
            self._keep_to_myself()
            return
        try:
            self._exchange(party, self._board, states)
        except (RuntimeError, OSError):
            self._lose_store(party)

    def _exchange(self, party: Party, board: Board, states: dict[int, State]) -> None:
        incident = self._incident
        board.beat(self.doing)
        before = bool(incident.failures)
        self._note(board.new_failures())  # before the processes: one that has said why it ends is not missed
        self._look_at_processes(party, states)
        self._look_at_remote(party, board)
        if self._outbox:
            while self._outbox:
                board.post(self._outbox[0])
                self._outbox.pop(0)
            self._note(board.new_failures())
        if incident.failures and not before:
            where, waiting = main_thread_location()
            board.answer(Answer(doing=self.doing, where=where, waiting=waiting))
        if incident.cause is not None and party.rank == 0:
            alive = len(party.processes) - len({f.rank for f in incident.failures if f.kind == "ended"})
            if board.seen() >= alive:
                incident.known_to_all.set()

    def _look_at_processes(self, party: Party, states: dict[int, State]) -> None:
        for rank, state in states.items():
            if state == "gone":
                self._ended(party, rank, f"its process (pid {party.processes[rank].pid}) is gone")
        self._look_at_family(party)

    def _note(self, failures: Sequence[Failure]) -> None:
        if failures and not self._incident.failures:
            self._incident.first_seen = time.monotonic()
        self._incident.failures += failures

    def _keep_to_myself(self) -> None:
        self._note(self._outbox)
        self._outbox = []

    def _lose_store(self, party: Party) -> None:
        self._store_lost = True
        if party.rank0_has_store:
            self._ended(party, 0, "it does not answer any more")
        self._keep_to_myself()
        if not self._incident.failures:
            self._accept(Cause(kind="ended", rank=None, text="The launcher of the ranks has ended.", speaker=None))

    def _local_states(self, party: Party) -> dict[int, State]:
        return {
            rank: process.state()
            for rank, process in enumerate(party.processes)
            if process.is_local and rank != party.rank
        }

    def _look_at_family(self, party: Party) -> None:
        for local_rank, child in enumerate(self._children, 1):
            code = child.poll()
            if code is not None:
                self._ended(
                    party, party.rank + local_rank, f"its process (pid {child.pid}) {exit_text(code)}", sure=True
                )

    def _look_at_remote(self, party: Party, board: Board) -> None:
        """The neighbours in rank, if they are on other machines."""
        world_size = len(party.processes)
        for rank in {(party.rank + 1) % world_size, (party.rank - 1) % world_size}:
            if party.processes[rank].is_local:
                continue
            beat = f"{board.beat_of(rank)}"
            last, since = self._beats.get(rank, (None, self._polls))
            if beat != last:
                self._beats[rank] = (beat, self._polls)
                continue
            limit = _SILENT_POLLS if self._incident.failures else _SILENT_POLLS_ALONE
            if self._polls - since > limit:
                self._ended(party, rank, f"no sign of it for {(self._polls - since) * _POLL_SECONDS:.0f} s")

    def _ended(self, party: Party, rank: int, how: str, *, sure: bool = False) -> None:
        """Posts that a rank's process is gone, unless its run was over or it has said why."""
        key = rank + (len(party.processes) if sure else 0)
        if key in self._told or any(f.rank == rank and f.kind != "ended" for f in self._incident.failures):
            return
        doing = ""
        if not self._store_lost and self._board is not None and not (rank == 0 and party.rank0_has_store):
            try:
                if self._board.has_left(rank):
                    return
                doing = self._board.beat_of(rank) or ""
            except (RuntimeError, OSError):
                self._store_lost = True
        self._told.add(key)
        self._outbox.append(Failure(rank=rank, kind="ended", text=how, doing=doing))

    # ---- decisions

    def _try_to_decide(self, party: Party) -> None:
        incident = self._incident
        seconds = time.monotonic() - incident.first_seen
        if self._store_lost or self._board is None:
            if is_ripe(incident.failures, len(party.processes), seconds):
                self._accept(self._choose({}))
            return
        board = self._board
        try:
            cause = board.decided()
            if cause is None and is_ripe(incident.failures, len(party.processes), seconds):
                cause = board.decide(lambda: self._choose(board.answers(len(party.processes))))
            if cause is not None:
                if cause.speaker is None and self._in_failed:
                    incident.speech = board.claim_speech()
                board.note_seen()
                self._accept(cause)
        except (RuntimeError, OSError):
            self._lose_store(party)

    def _choose(self, answers: dict[int, Answer]) -> Cause:
        party = self._party
        if party is None:
            raise RuntimeError("Causes are decided by ranks that have met.")
        return choose_cause(
            [*self._incident.failures, *self._outbox],
            world_size=len(party.processes),
            own_rank=party.rank,
            own_doing=self.doing,
            answers=answers,
            stopped=[r for r, state in self._local_states(party).items() if state == "stopped"],
            timeout=str(self._timeout),
        )

    def _accept(self, cause: Cause) -> None:
        incident = self._incident
        if incident.cause is None:
            incident.cause, incident.decided_at = cause, time.monotonic()
            if self._store_lost and cause.speaker is None:
                incident.speech = self._is_first_alive()
        incident.decided.set()

    def _is_first_alive(self) -> bool:
        """Without a store the first rank that lives speaks; ranks of other machines count as living."""
        party = self._party
        if party is None:
            return True
        lower = [p for p in party.processes[: party.rank]]
        return all(p.is_local and p.state() != "running" for p in lower)

    def _enforce(self, party: Party, cause: Cause) -> None:
        """Ends the process if the main thread does not, which is stuck in a collective or in the user's code."""
        seconds = time.monotonic() - self._incident.decided_at
        if cause.speaker == party.rank:
            if seconds > _SPEECH_SECONDS:
                if self._raised is not None:
                    traceback.print_exception(self._raised)
                self._end_process()
        elif self._in_failed:
            if seconds > _SPEECH_SECONDS:
                self._end_process()
        elif seconds > _RETURN_SECONDS:
            if cause.speaker is None and self._claims():
                _say(cause.text)
                self._end_stopped()
            elif seconds < 2 * _RETURN_SECONDS:
                return  # another one may be about to speak
            self._end_process()

    def _claims(self) -> bool:
        incident = self._incident
        if incident.speech is None:
            try:
                alone = self._store_lost or self._board is None
                incident.speech = self._is_first_alive() if alone else self._board.claim_speech()
            except (RuntimeError, OSError):
                incident.speech = self._is_first_alive()
        return incident.speech


def _say(text: str) -> None:
    """Shows an error for which there is no traceback."""
    sys.stderr.write(f"lightning_hybrid: {RankError.__name__}: {text}\n")
    sys.stderr.flush()
