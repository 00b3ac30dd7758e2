"""Changes that callbacks have made are found once, and those of an earlier run are not."""

from __future__ import annotations

from types import SimpleNamespace

from lightning_hybrid.adapt.phases import Phase
from lightning_hybrid.callbacks import AdaptiveBatchSize, LoadRebalancing, PhaseSchedule
from lightning_hybrid.callbacks.events import Event, Events


def test_changes_are_collected_once() -> None:
    batch_size, rebalancing = AdaptiveBatchSize(), LoadRebalancing()
    phases = PhaseSchedule([Phase(), Phase(at_step=4)])
    batch_size.events.append({"step": 1, "samples": 8, "from": 8, "to": 16})
    events = Events(SimpleNamespace(callbacks=[batch_size, rebalancing, phases]))  # type: ignore[arg-type]
    assert events.collect(2) == [], "those of an earlier run"
    batch_size.events.append({"step": 3, "samples": 40, "from": 16, "to": 32})
    move = {"step": 4, "kind": "stages", "division": (2,), "gain": 0.25, "taken_back": False}
    rebalancing.moves += [move, {**move, "step": 6, "taken_back": True}]
    phases._state = phases._state.next()
    events.add(5, "relayout", "dp2 -> pp2")
    assert events.collect(6) == [
        Event(5, "relayout", "dp2 -> pp2"),
        Event(3, "batch_size", "16 -> 32 samples"),
        Event(4, "rebalancing", "stages: a step should become 25% shorter"),
        Event(6, "rebalancing", "stages: reverted"),
        Event(6, "phase", "phase 1"),
    ]
    assert events.collect(8) == []
    assert events.counts == {"relayout": 1, "phase": 1, "batch_size": 1, "rebalancing": 2}
