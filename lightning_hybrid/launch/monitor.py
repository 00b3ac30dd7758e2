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
from datetime import timedelta
from subprocess import Popen
from typing import Any, NoReturn

from lightning_hybrid.launch.failures import Answer, Cause, RankFailed, choose_cause, failure_of, is_ripe
from lightning_hybrid.launch.peers import POLL_SECONDS, PeerMonitor
from lightning_hybrid.launch.processes import RankGroup, exit_text, process_state
from lightning_hybrid.spec.errors import RankError

_RETURN_SECONDS = 3.0
"""How long a quiet rank's main thread may take to come back from a collective; closed connections wake it at once."""
_SPEECH_SECONDS = 10.0
"""How long the rank with the cause may take for callbacks and loggers; all ranks are to end within 15 s."""
_PATIENCE_SECONDS = 12.0
"""How long a failing main thread waits for the decision; one with a dead store takes its own."""
_LAST_WORD_SECONDS = 3.0
"""How long a quiet rank stays for another to speak: launchers end all ranks as soon as the first one goes."""
_FINALIZE_SECONDS = 5.0
_INTERRUPTED_SECONDS = 10.0
"""How long a rank that stops on SIGTERM stays for the others to end."""
_LEAVING_POLL_SECONDS = 0.02
_DEATH_SECONDS = 0.1
"""Connections of a killed process close a little before it counts as gone."""


@dataclass
class _Decision:
    """The cause of a failed run, once it is decided."""

    cause: Cause | None = None
    alone: bool = False
    """Whether this rank has decided by itself, without a store."""
    at: float = 0.0
    decided: threading.Event = field(default_factory=threading.Event)
    known_to_all: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    speech: bool | None = None
    """Whether this rank shows a cause that has no speaker of its own; None: not asked."""


class FailureMonitor:
    """Watches over the runs of one strategy, one after another.

    Args:
        timeout: How long collectives wait, for the text of errors.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._doing: tuple[str, int | None, int | None, bool] = ("start", None, None, False)
        self._lookout: PeerMonitor | None = None
        self._thread: threading.Thread | None = None
        self._finished = threading.Event()
        self._raised: BaseException | None = None
        self._raising = self._in_failed = False
        self._decision = _Decision()
        self._hook: Callable[..., None] | None = None
        self._previous_hook: Callable[..., Any] = sys.excepthook

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
    def met(self) -> bool:
        """Whether all ranks have come."""
        return self._lookout is not None

    @property
    def failing(self) -> bool:
        """Whether the ranks can no longer work together."""
        return self._raising and self._decision.cause is not None

    def begin(self, children: Sequence[Popen], main_pid: int | None) -> None:
        """Starts to watch.

        Args:
            children: Ranks that this process has started, local rank 1 first.
            main_pid: The process that has started this one, if its end ends the run.
        """
        self._children, self._main_pid = children, main_pid
        self._decision = _Decision()
        self._wake, self._finished = threading.Event(), threading.Event()
        self._lookout, self._raised = None, None
        self._raising = self._in_failed = False
        self._doing = ("start", None, None, False)
        self._hook_process()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def connect(self, party: RankGroup) -> None:
        """From now on this rank tells the others, and looks at them."""
        self._lookout = PeerMonitor(party, self._children, lambda: self.doing)

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
        atexit.unregister(self._at_exit)
        atexit.register(self._at_exit)
        lookout, decision = self._lookout, self._decision
        if lookout is None or self._thread is None or isinstance(error, RankFailed):
            return None
        self._in_failed = True
        lookout.outbox.append(failure_of(error, lookout.party.rank, self.doing))
        self._wake.set()
        if not decision.decided.wait(_PATIENCE_SECONDS):  # the store does not answer
            lookout.is_alone = True
            self._accept(lookout, self._choose(lookout, {}))
        return self._answer(lookout, error)

    def _answer(self, lookout: PeerMonitor, error: BaseException | None) -> BaseException | None:
        """What this rank raises, which has raised `error` or nothing, when the cause is decided."""
        cause, rank = self._decision.cause, lookout.party.rank
        if cause is None:
            return None
        if rank == 0 and lookout.party.rank0_has_store:
            self._decision.known_to_all.wait(_LAST_WORD_SECONDS)  # the store ends with this process
        if cause.reporter is None:
            self._claims(lookout)
        if self._reports(cause):
            self._end_stopped(lookout)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            if cause.rank == rank and len({f.rank for f in lookout.failures}) < lookout.world_size:
                _say(cause.text)  # these show nothing by themselves
            return None
        if self._reports(cause):
            return None if cause.reporter == rank else RankError(cause.text)
        self._wait_for_reporter(lookout, cause)
        return RankFailed(cause.text)

    def note_unsaved(self, path: object) -> None:
        """Says, once, that a callback's checkpoint is not saved."""
        cause = self._decision.cause
        if cause is not None and self._reports(cause):
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

    def finish(self) -> BaseException | None:
        """Ends watching, when all ranks have ended their run: one may still fail in its last hooks.

        Returns:
            What to raise if one has.
        """
        thread, lookout = self._thread, self._lookout
        if thread is None:
            return None
        self._finished.set()
        self._wake.set()
        if not self.failing:
            thread.join(_INTERRUPTED_SECONDS if self._raising else self._timeout.total_seconds())
        self._thread = self._raised = None
        if lookout is None or self._raising or self._decision.cause is None:
            if not self._raising and not self.failing:
                self._unhook_process()
            return None
        self._raising = self._in_failed = True
        return self._answer(lookout, None)

    def _wait_for_reporter(self, lookout: PeerMonitor, cause: Cause) -> None:
        deadline = time.monotonic() + _LAST_WORD_SECONDS
        while time.monotonic() < deadline and not lookout.has_reported(cause.reporter):
            time.sleep(_LEAVING_POLL_SECONDS)

    # ---- the end of the process

    def _unhook_process(self) -> None:
        """Restores `sys.excepthook`; after an error it stays, since the error has not reached the top yet."""
        if sys.excepthook is self._hook:
            sys.excepthook = self._previous_hook
        self._hook = None

    def _hook_process(self) -> None:
        """Sees exceptions that reach the top: those from `on_exception` and teardown pass no other place."""
        self._unhook_process()
        previous = sys.excepthook
        while (monitor := getattr(previous, "monitor", None)) is not None:  # of a run that has failed
            previous = monitor._previous_hook

        def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            shown: BaseException | None = error
            cause = self._decision.cause
            if self._thread is not None and cause is None:
                replacement = self.failed(error)
                shown = None if isinstance(replacement, RankFailed) else (replacement or error)
            elif cause is not None and not isinstance(error, RankError) and not self._reports(cause):
                shown = None
            if shown is error:
                previous(kind, error, trace)
            elif shown is not None:
                previous(type(shown), shown, None)

        hook.monitor = self  # type: ignore[attr-defined]
        self._hook, self._previous_hook = hook, previous
        sys.excepthook = hook

    def _reports(self, cause: Cause) -> bool:
        return self._lookout is None or cause.reporter == self._lookout.party.rank or bool(self._decision.speech)

    def _note_reported(self) -> None:
        """Lets the other ranks leave, once this one has shown the cause and its loggers are closed."""
        lookout, cause = self._lookout, self._decision.cause
        if lookout is not None and cause is not None and self._reports(cause) and not lookout.is_alone:
            with contextlib.suppress(RuntimeError, OSError):
                lookout.board.note_reported()

    def _at_exit(self) -> None:
        self._note_reported()
        if self.failing:
            # process groups with open requests may wait for each other for ever in their destructors
            faulthandler.dump_traceback_later(_FINALIZE_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115

    def _end_process(self) -> NoReturn:
        for child in multiprocessing.active_children():  # workers of data loaders, which may hang too
            child.kill()
        if self._lookout is not None:
            self._end_stopped(self._lookout)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self._note_reported()
        os._exit(1)

    def _end_stopped(self, lookout: PeerMonitor) -> None:
        """A stopped process cannot end itself."""
        for process in lookout.party.processes:
            if process.is_local and process.pid != os.getpid() and process.state() == "stopped":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    # ---- the thread

    def _run(self) -> None:
        while True:
            self._wake.wait(_LEAVING_POLL_SECONDS if self._finished.is_set() else POLL_SECONDS)
            self._wake.clear()
            lookout = self._lookout
            if self._finished.is_set() and (lookout is None or self.failing or lookout.leave()):
                return
            if lookout is None:
                self._before_meeting()
                continue
            if lookout.outbox:
                time.sleep(_DEATH_SECONDS)
            lookout.look()
            if self._decision.cause is None:
                self._try_to_decide(lookout)
            if self._decision.cause is not None:
                if self._is_known(lookout) and self._finished.is_set():
                    return  # the main thread is waiting for this
                if not self._finished.is_set():
                    self._enforce(lookout, self._decision.cause)

    def _before_meeting(self) -> None:
        if self._main_pid is not None and process_state(self._main_pid) == "gone":
            if os.environ.get("LOCAL_RANK") == "1":
                _say("The run cannot start: the process that had started the ranks ended without a word.")
            self._end_process()

    # ---- decisions

    def _try_to_decide(self, lookout: PeerMonitor) -> None:
        if lookout.is_alone and not lookout.failures:
            self._accept(lookout, Cause(kind="ended", rank=None, text=_NO_LAUNCHER, reporter=None))
        if not lookout.failures:
            return
        ripe = is_ripe(lookout.failures, lookout.world_size, time.monotonic() - lookout.first_seen)
        if ripe and lookout.party.rank0_has_store and lookout.states().get(0) in ("stopped", "gone"):
            lookout.is_alone = True
        if lookout.is_alone:
            if ripe:
                self._accept(lookout, self._choose(lookout, {}))
            return
        board = lookout.board
        try:
            cause = board.decided()
            if cause is None and ripe:
                cause = board.decide(lambda: self._choose(lookout, board.answers(lookout.world_size)))
            if cause is None:
                return
            board.note_seen()
            self._accept(lookout, cause)
        except (RuntimeError, OSError):
            lookout.lose_store()

    def _choose(self, lookout: PeerMonitor, answers: dict[int, Answer]) -> Cause:
        return choose_cause(
            [*lookout.failures, *lookout.outbox],
            world_size=lookout.world_size,
            own_rank=lookout.party.rank,
            own_doing=self.doing,
            answers=answers,
            stopped=[r for r, state in lookout.states().items() if state == "stopped"],
            timeout=str(self._timeout),
        )

    def _accept(self, lookout: PeerMonitor, cause: Cause) -> None:
        decision = self._decision
        if decision.cause is None:
            decision.alone, decision.at, decision.cause = lookout.is_alone, time.monotonic(), cause
        decision.decided.set()

    def _enforce(self, lookout: PeerMonitor, cause: Cause) -> None:
        """Ends the process if the main thread does not, which is stuck in a collective or in the user's code."""
        seconds = time.monotonic() - self._decision.at
        if cause.reporter == lookout.party.rank:
            if seconds > _SPEECH_SECONDS:
                if self._raised is not None:
                    traceback.print_exception(self._raised)
                self._end_process()
        elif self._in_failed:
            if seconds > _SPEECH_SECONDS:
                self._end_process()
        elif seconds > _RETURN_SECONDS:
            if cause.reporter is None and self._claims(lookout):
                _say(cause.text)
            elif seconds < _RETURN_SECONDS + _LAST_WORD_SECONDS and not lookout.has_reported(cause.reporter):
                return  # a launcher ends all ranks when the first one exits
            self._end_process()

    def _is_known(self, lookout: PeerMonitor) -> bool:
        """Whether all ranks know the cause, if they learn it from this one's store."""
        known = lookout.is_alone or not (lookout.party.rank == 0 and lookout.party.rank0_has_store)
        if not known:
            with contextlib.suppress(RuntimeError):
                known = lookout.everyone_knows()
        if known or time.monotonic() - self._decision.at > _LAST_WORD_SECONDS:
            self._decision.known_to_all.set()
        return self._decision.known_to_all.is_set()

    def _claims(self, lookout: PeerMonitor) -> bool:
        """Whether this rank is to show a cause that has no speaker of its own; both threads may ask."""
        decision = self._decision
        with decision.lock:
            if decision.speech is None:
                decision.speech = False
                if decision.alone:
                    decision.speech = lookout.is_first_alive()
                else:
                    with contextlib.suppress(RuntimeError):  # a store that is gone since has ended after a speech
                        decision.speech = lookout.board.claim_report()
        return decision.speech


_NO_LAUNCHER = "The launcher of the ranks has ended without a word."


def _say(text: str) -> None:
    """Shows an error for which there is no traceback."""
    sys.stderr.write(f"lightning_hybrid: {RankError.__name__}: {text}\n")
    sys.stderr.flush()
