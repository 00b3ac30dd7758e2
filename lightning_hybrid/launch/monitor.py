"""Monitors failures in a thread beside each rank's main thread: decides on the cause, and ends processes that hang.

The main thread records its operation; the monitor thread sends a heartbeat about twice per second and checks those of
other ranks. After a failure all ranks learn the single cause. The reporter is the rank that caused the failure, which
raises its own exception, or if that rank cannot, the first rank that can. All others exit quietly once the reporter has
set the key `reported`: the main thread raises `RankFailed` if it returns from its collective, or the process is ended.
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
from lightning_hybrid.launch.tracebacks import show_folded
from lightning_hybrid.spec.errors import RankError

_RETURN_SECONDS = 3.0
"""Seconds for a quiet rank's main thread to return from a collective; closed connections wake the thread at once."""
_REPORT_SECONDS = 10.0
"""Seconds for the reporter's callbacks and loggers; all ranks are to end within 15 s."""
_PATIENCE_SECONDS = 12.0
"""Seconds for which a failing main thread waits for the decision; without a live store the rank decides alone."""
_AWAIT_REPORT_SECONDS = 3.0
"""Longest delay of a quiet rank's exit for the report: a launcher kills all ranks when the first one exits."""
_FINALIZE_SECONDS = 5.0
_INTERRUPTED_SECONDS = 10.0
"""Seconds for which a rank that stops on SIGTERM waits for the other ranks to end."""
_LEAVING_POLL_SECONDS = 0.02
_DEATH_SECONDS = 0.1
"""Delay before processes are checked: connections of a killed process close slightly before it counts as gone."""


@dataclass
class _Decision:
    """The decision on the cause of a failed run."""

    cause: Cause | None = None
    alone: bool = False
    """True if this rank has decided alone, without a store."""
    at: float = 0.0
    decided: threading.Event = field(default_factory=threading.Event)
    known_to_all: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_reporter: bool | None = None
    """True if this rank reports a failure whose own rank cannot; None until decided."""
    polls_after_report: int = 0


class FailureMonitor:
    """Monitors the runs of one strategy, one after another.

    Args:
        timeout: The timeout of collectives.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._hook: Callable[..., None] | None = None
        self.previous_hook: Callable[..., Any] = sys.excepthook
        self._reset((), None)

    def _reset(self, children: Sequence[Popen], main_pid: int | None) -> None:
        self._children, self._main_pid = children, main_pid
        self.operation = "start"
        """The main thread's operation, as text for messages."""
        self._peers: PeerMonitor | None = None
        self._wake, self._finished = threading.Event(), threading.Event()
        self._raised: BaseException | None = None
        self._raising = self._in_failed = False
        self._decision = _Decision()

    # ---- the main thread's side

    @contextmanager
    def during(self, operation: str, batch: int | None = None, step: int | None = None) -> Iterator[None]:
        """Records the main thread's `operation`, with `batch` and `step` if given; the record outlives an exception."""
        at = "" if batch is None else f" of batch {batch}" + ("" if step is None else f" (global step {step})")
        self.operation = f"{operation}{at}"
        yield
        self.operation = f"after {operation}{at}"

    @property
    def connected(self) -> bool:
        """True if all ranks have met."""
        return self._peers is not None

    @property
    def peers(self) -> PeerMonitor | None:
        """The connection to the other ranks, once all ranks have met."""
        return self._peers

    @property
    def cause(self) -> Cause | None:
        """The cause of the failure of any rank; None while all ranks run."""
        return self._decision.cause

    @property
    def failing(self) -> bool:
        """True if the ranks can no longer run collectives together."""
        return self._raising and self._decision.cause is not None

    def begin(self, children: Sequence[Popen], main_pid: int | None) -> None:
        """Starts the monitor thread.

        Args:
            children: The processes of the ranks that this process has started, local rank 1 first.
            main_pid: The pid of the process whose end ends the run; None: there is none.
        """
        self._reset(children, main_pid)
        self._hook_process()
        self._thread = threading.Thread(target=self._run, name="failure monitor", daemon=True)
        self._thread.start()

    def connect(self, group: RankGroup) -> None:
        """Starts to exchange heartbeats and failures with the other ranks of `group`."""
        self._peers = PeerMonitor(group, self._children, lambda: self.operation)

    def check_children(self) -> None:
        """Raises `RankError` if a rank that this process has started has ended before all ranks have met."""
        for local_rank, child in enumerate(self._children, 1):
            code = child.poll()
            if code is not None:
                raise RankError(
                    f"The run cannot start: the process of local rank {local_rank} (pid {child.pid}) has ended before "
                    f"the ranks met, {exit_text(code)}. Its own error, if it could print one, is above."
                )

    def failed(self, error: BaseException) -> BaseException | None:
        """Posts `error` to the other ranks, and waits for the decision on the cause.

        Returns:
            The exception to raise in place of `error`; None: `error` itself.
        """
        self._raised, self._raising = error, True
        atexit.unregister(self._at_exit)
        atexit.register(self._at_exit)
        peers, decision = self._peers, self._decision
        if peers is None or self._thread is None or isinstance(error, RankFailed):
            return None
        self._in_failed = True
        peers.outbox.append(failure_of(error, peers.group.rank, self.operation))
        self._wake.set()
        if not decision.decided.wait(_PATIENCE_SECONDS):  # the store does not answer
            peers.decide_alone()
            self._accept(peers, self._choose(peers, {}))
        return self._answer(peers, error)

    def _answer(self, peers: PeerMonitor, error: BaseException | None) -> BaseException | None:
        """Returns the exception to raise in place of `error` once the cause is decided; None: `error` itself."""
        cause, rank = self._decision.cause, peers.group.rank
        if cause is None:
            return None
        if rank == 0 and peers.group.rank0_has_store:
            self._decision.known_to_all.wait(_AWAIT_REPORT_SECONDS)  # the store ends with this process
        if cause.reporter is None:
            self._claims(peers)
        if self._reports(cause):
            self._end_stopped(peers)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            if cause.rank == rank and len({f.rank for f in peers.failures}) < peers.world_size:
                _print_error(cause.text)  # Python prints no message for these
            return None
        if self._reports(cause):
            return None if cause.reporter == rank else RankError(cause.text)
        deadline = time.monotonic() + _AWAIT_REPORT_SECONDS
        while time.monotonic() < deadline and not peers.has_reported(cause.reporter):
            time.sleep(_LEAVING_POLL_SECONDS)
        return RankFailed(cause.text)

    def note_unsaved(self, path: object) -> None:
        """Warns, on the reporter only, that a callback's checkpoint `path` is not saved."""
        cause = self._decision.cause
        if cause is not None and self._reports(cause):
            warnings.warn(
                f"{path} is not saved: a checkpoint needs all ranks, and the run has failed. {cause.text}",
                RuntimeWarning,
                stacklevel=2,
            )

    def failed_elsewhere(self, text: str) -> None:
        """Records the failure of ranks of which this process is none, so that it saves no checkpoint of the run."""
        self._raising = True
        self._decision.cause = Cause(kind="raised", rank=None, text=text, reporter=None)

    def forget(self) -> None:
        """Forgets the failure of an earlier run."""
        self._reset((), None)

    def interrupted(self) -> None:
        """Records that all ranks raise an exception together in order to stop."""
        self._raising = True

    def torn_down(self) -> None:
        """Calls `finish` if an exception caused the strategy's teardown, because the run is over then, too."""
        if self._raising:
            self.finish()

    def finish(self) -> BaseException | None:
        """Stops the monitor thread once all ranks have ended their run: a rank may still fail in its last hooks.

        Returns:
            The exception to raise if a rank has failed; None otherwise.
        """
        thread, peers = self._thread, self._peers
        if thread is None:
            return None
        self._finished.set()
        self._wake.set()
        if not self.failing:
            thread.join(_INTERRUPTED_SECONDS if self._raising else self._timeout.total_seconds())
        self._thread = self._raised = None
        if peers is None or self._raising or self._decision.cause is None:
            if not self._raising:
                self._unhook_process()
            return None
        self._raising = self._in_failed = True
        return self._answer(peers, None)

    # ---- the end of the process

    def _unhook_process(self) -> None:
        """Restores `sys.excepthook`; after an error the hook stays until the error reaches the top of the stack."""
        if sys.excepthook is self._hook:
            sys.excepthook = self.previous_hook
        self._hook = None

    def _hook_process(self) -> None:
        """Sets `sys.excepthook`: nothing else catches exceptions of `on_exception` and teardown."""
        self._unhook_process()
        previous = sys.excepthook
        while (monitor := getattr(previous, "monitor", None)) is not None:  # the hook of a failed run
            previous = monitor.previous_hook

        def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            shown: BaseException | None = error
            cause = self._decision.cause
            if self._thread is not None and cause is None:
                replacement = self.failed(error)
                shown = None if isinstance(replacement, RankFailed) else (replacement or error)
            elif cause is not None and not isinstance(error, RankError) and not self._reports(cause):
                shown = None
            if shown is not None:
                show = show_folded if previous is sys.__excepthook__ else previous
                show(type(shown), shown, trace if shown is error else None)
            self._note_reported()

        hook.monitor = self  # type: ignore[attr-defined]
        self._hook, self.previous_hook = hook, previous
        sys.excepthook = hook

    def _reports(self, cause: Cause) -> bool:
        return self._peers is None or cause.reporter == self._peers.group.rank or bool(self._decision.is_reporter)

    def _note_reported(self) -> None:
        """Sets the key `reported` if this rank is the reporter, so that the other ranks exit."""
        peers, cause = self._peers, self._decision.cause
        if peers is not None and cause is not None and self._reports(cause):
            peers.note_reported()

    def _at_exit(self) -> None:
        self._note_reported()
        if self.failing:
            # process groups with open requests may wait for each other for ever in their destructors
            faulthandler.dump_traceback_later(_FINALIZE_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115

    def _end_process(self) -> NoReturn:
        for child in multiprocessing.active_children():  # workers of data loaders, which may hang too
            child.kill()
        if self._peers is not None:
            self._end_stopped(self._peers)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self._note_reported()
        os._exit(1)

    def _end_stopped(self, peers: PeerMonitor) -> None:
        """Kills stopped ranks of this machine, since a stopped process cannot end itself."""
        for process in peers.group.processes:
            if process.is_local and process.pid != os.getpid() and process.state() == "stopped":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    # ---- the thread

    def _run(self) -> None:
        while True:
            self._wake.wait(_LEAVING_POLL_SECONDS if self._finished.is_set() else POLL_SECONDS)
            self._wake.clear()
            peers = self._peers
            if self._finished.is_set() and (peers is None or self.failing or peers.leave()):
                return
            if peers is None:
                self._before_meeting()
                continue
            if peers.outbox:
                time.sleep(_DEATH_SECONDS)
            peers.poll()
            if self._decision.cause is None:
                self._try_to_decide(peers)
            if self._decision.cause is not None:
                if self._is_known(peers) and self._finished.is_set():
                    return  # the main thread is waiting for this
                if not self._finished.is_set():
                    self._enforce(peers, self._decision.cause)

    def _before_meeting(self) -> None:
        if self._main_pid is not None and process_state(self._main_pid) == "gone":
            if os.environ.get("LOCAL_RANK") == "1":
                _print_error("The run cannot start: the process that had started the ranks ended without a word.")
            self._end_process()

    # ---- decisions

    def _try_to_decide(self, peers: PeerMonitor) -> None:
        if peers.is_alone and not peers.failures:
            text = "The launcher of the ranks has ended without a word."
            self._accept(peers, Cause(kind="ended", rank=None, text=text, reporter=None))
        if not peers.failures:
            return
        ripe = is_ripe(peers.failures, peers.world_size, time.monotonic() - peers.first_seen)
        if ripe and peers.group.rank0_has_store and peers.states().get(0) in ("stopped", "gone"):
            peers.decide_alone()
        if peers.is_alone:
            if ripe:
                self._accept(peers, self._choose(peers, {}))
            return
        store = peers.store
        try:
            cause = store.decided()
            if cause is None and ripe:
                cause = store.decide(lambda: self._choose(peers, store.answers(peers.world_size)))
            if cause is None:
                return
            store.note_seen()
            self._accept(peers, cause)
        except (RuntimeError, OSError):
            peers.lose_store()

    def _choose(self, peers: PeerMonitor, answers: dict[int, Answer]) -> Cause:
        return choose_cause(
            [*peers.failures, *peers.outbox],
            world_size=peers.world_size,
            own_rank=peers.group.rank,
            own_operation=self.operation,
            answers=answers,
            stopped=[r for r, state in peers.states().items() if state == "stopped"],
            timeout=str(self._timeout),
        )

    def _accept(self, peers: PeerMonitor, cause: Cause) -> None:
        decision = self._decision
        if decision.cause is None:
            decision.alone, decision.at, decision.cause = peers.is_alone, time.monotonic(), cause
        decision.decided.set()

    def _enforce(self, peers: PeerMonitor, cause: Cause) -> None:
        """Ends the process if the main thread does not, because it is stuck in a collective or in the user's code."""
        seconds = time.monotonic() - self._decision.at
        own = cause.reporter == peers.group.rank
        if own or self._in_failed:
            if seconds > _REPORT_SECONDS:
                if own and self._raised is not None:
                    traceback.print_exception(self._raised)
                self._end_process()
        elif seconds > _RETURN_SECONDS and cause.reporter is None and self._claims(peers):
            _print_error(cause.text)
            self._end_process()
        else:
            self._decision.polls_after_report += peers.has_reported(cause.reporter)
            limit = _RETURN_SECONDS + (_AWAIT_REPORT_SECONDS if cause.reporter is None else 0.0)
            # at the first poll after the report the main thread may be about to return
            if self._decision.polls_after_report > 1 or seconds > limit:
                self._end_process()

    def _is_known(self, peers: PeerMonitor) -> bool:
        """Returns True if all ranks that need this rank's store know the cause, or have had the time to read it."""
        known = peers.is_alone or not (peers.group.rank == 0 and peers.group.rank0_has_store)
        if not known:
            with contextlib.suppress(RuntimeError):
                known = peers.everyone_knows()
        if known or time.monotonic() - self._decision.at > _AWAIT_REPORT_SECONDS:
            self._decision.known_to_all.set()
        return self._decision.known_to_all.is_set()

    def _claims(self, peers: PeerMonitor) -> bool:
        """Returns True if this rank reports a failure whose own rank cannot; both threads may call it."""
        decision = self._decision
        with decision.lock:
            if decision.is_reporter is None:
                decision.is_reporter = False
                if decision.alone:
                    decision.is_reporter = peers.is_first
                else:
                    with contextlib.suppress(RuntimeError):  # a store that is gone ended after the report
                        decision.is_reporter = peers.store.claim_report()
        return decision.is_reporter


def _print_error(text: str) -> None:
    """Prints an error that has no traceback."""
    print(f"lightning_hybrid: {RankError.__name__}: {text}", file=sys.stderr, flush=True)  # noqa: T201
