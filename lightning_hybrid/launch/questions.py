"""Lets ranks compare what each is about to do, through the failure monitor's store instead of a collective.

A rank that is about to do something unexpected cannot ask by a collective: the others may be in another one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from lightning_hybrid.launch.failures import RankFailed
from lightning_hybrid.launch.monitor import FailureMonitor
from lightning_hybrid.launch.store import FailureStore

_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.0005, 0.02
_LOOK_SECONDS = 0.25
"""Seconds between looks at the progress of other ranks, which publish it every half second."""


class Place(NamedTuple):
    """The place of an event in a run."""

    step: int
    event: int


class Difference(NamedTuple):
    """A rank that does something else than this one."""

    rank: int
    answer: str | None
    """What the rank does instead; None if it has gone on without asking, as expected."""


class Questions:
    """Compares answers of ranks at places that all of them reach.

    Args:
        monitor: The failure monitor.
        ranks: The ranks that compare.
        name: Unique among the questions of a run, and equal on all of `ranks`.
        patience_seconds: Longest time to wait for the others.
    """

    def __init__(self, monitor: FailureMonitor, ranks: Sequence[int], name: str, patience_seconds: float) -> None:
        self._monitor, self._ranks, self._name, self._patience = monitor, ranks, name, patience_seconds
        self._proposed: list[str] = []

    def at(self, place: Place) -> None:
        """Notes that this rank has come to `place`, before which it asks no more."""
        peers = self._monitor.peers
        if peers is not None:
            peers.progress = f"{self._name}/{place.step}/{place.event}"

    def compare(self, place: Place, answer: str) -> Difference | None:
        """Waits until all ranks have asked at `place`; returns None if all have the same answer.

        Raises:
            RankFailed: If the run fails in the meantime.
        """
        peers = self._monitor.peers
        if peers is None or peers.is_alone:
            return None
        question = f"{self._name}/{place.step}/{place.event}"
        try:
            first, expected = peers.store.propose(question, answer)
            if expected != answer:
                peers.store.object(question, answer)
                return Difference(first, expected)
            difference = self._wait(peers.store, question, place)
            for earlier in self._proposed:
                peers.store.forget(earlier)
            self._proposed = [question] if first == peers.group.rank else []
            return difference
        except (RuntimeError, OSError):  # the store is gone, and with it the run
            return None

    def _wait(self, store: FailureStore, question: str, place: Place) -> Difference | None:
        """Waits until all ranks agree, one objects, or one has gone on beyond `place`."""
        agreed, began = store.agree(question, 1), time.monotonic()
        looked, pause = began, _POLL_SECONDS
        while agreed < len(self._ranks):
            if (cause := self._monitor.cause) is not None:
                raise RankFailed(cause.text)
            if (objection := store.objection(question)) is not None:
                return Difference(*objection)
            now = time.monotonic()
            if now - looked > _LOOK_SECONDS:
                looked = now
                beyond = next((r for r in self._ranks if self._is_beyond(store.progress_of(r), place)), None)
                late = now - began > self._patience
                if (beyond is not None or late) and store.agree(question, 0) < len(self._ranks):
                    return Difference(-1 if beyond is None else beyond, None)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)
            agreed = store.agree(question, 0)
        return None

    def _is_beyond(self, progress: str | None, place: Place) -> bool:
        name, _, numbers = (progress or "").partition("/")
        return name == self._name and Place(*map(int, numbers.split("/"))) > place
