"""Collects what other callbacks have changed during a run: layout, batch size, balance, phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl

from lightning_hybrid.callbacks.adaptive_batch_size import AdaptiveBatchSize
from lightning_hybrid.callbacks.load_rebalancing import LoadRebalancing
from lightning_hybrid.callbacks.phase_schedule import PhaseSchedule

KINDS: tuple[str, ...] = ("relayout", "phase", "batch_size", "rebalancing")


class Event(NamedTuple):
    """One change."""

    step: int
    kind: str
    """One of `KINDS`."""
    text: str


class Events:
    """The changes of a run, in the order in which they were found.

    Args:
        trainer: The trainer, when training starts; changes of earlier runs do not count.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
        self._seen = {id(c): len(_changes(c)) for c in self._callbacks}
        self._phases = {id(c): c.phase for c in self._callbacks if isinstance(c, PhaseSchedule)}
        self._new: list[Event] = []
        self.counts: dict[str, int] = dict.fromkeys(KINDS, 0)
        """Number of changes so far, by kind."""

    def add(self, step: int, kind: str, text: str) -> None:
        """Adds a change that no callback keeps."""
        self._new.append(Event(step, kind, text))

    def collect(self, step: int) -> list[Event]:
        """Returns the changes since the last call; `step` is the present step."""
        found, self._new = self._new, []
        for callback in self._callbacks:
            changes, known = _changes(callback), self._seen.get(id(callback), 0)
            found += changes[known:]
            self._seen[id(callback)] = len(changes)
            if isinstance(callback, PhaseSchedule) and callback.phase != self._phases.get(id(callback)):
                self._phases[id(callback)] = callback.phase
                found.append(Event(step, "phase", f"phase {callback.phase}"))
        for event in found:
            self.counts[event.kind] += 1
        return found


def _changes(callback: Any) -> list[Event]:
    if isinstance(callback, AdaptiveBatchSize):
        return [Event(e["step"], "batch_size", f"{e['from']} -> {e['to']} samples") for e in callback.events]
    if isinstance(callback, LoadRebalancing):
        return [Event(m["step"], "rebalancing", f"{m['kind']}: {_outcome(m)}") for m in callback.moves]
    return []


def _outcome(move: dict[str, Any]) -> str:
    return "reverted" if move["taken_back"] else f"a step should become {move['gain']:.0%} shorter"
