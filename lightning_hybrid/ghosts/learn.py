"""Learns from dry runs which state a step changes, and where a step that changes state can be cut.

1. The step runs once. If no place of the module's state has changed, that is all.
2. It runs again, on what it has left. State that is then the same was only computed once (a cache); a value of the
   first run that the second one uses is carried from step to step.
3. It runs from the start on other numbers. A cache must not depend on them.
4. It runs from the start once more, and the changed places are looked at before and after every call of a unit, and
   before every line of the user's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_hybrid._torch_private import tree_map, user_lines_seen
from lightning_hybrid.ghosts.contract import StateChange, StatePlace, StepContract
from lightning_hybrid.ghosts.free_code import WrittenByUnits
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.objects import Copy, map_leaves
from lightning_hybrid.ghosts.state import ModuleState
from lightning_hybrid.ghosts.written import Statistic, WrittenTensors


class Repeated:
    """Records the state that a step leaves, and the state after a second step.

    Args:
        state: The state of the module.
        before: Copies of the state before the step.
        statistics: Running statistics that the step has updated.
        is_written: Returns True for a real tensor that was written with a ghost.
    """

    def __init__(
        self,
        state: ModuleState,
        before: dict[StatePlace, Copy],
        statistics: Sequence[Statistic],
        is_written: Callable[[Any], bool],
    ) -> None:
        self._state, self._before = state, before
        self.places = state.changed(before, [statistic.tensor for statistic in statistics])
        self._after = {p: Copy(state.get(p)) for p in self.places}
        self._again: dict[StatePlace, Copy] | None = None
        self.used: set[int] = set()
        """Ids of the ghosts of the first step that the second one uses."""
        self.ghosts = {id(x): x for c in self._after.values() for x in c.leaves() if isinstance(x, Ghost)}
        """The ghosts that the first step has left, by id."""
        self._written = {p for p, c in self._after.items() if any(is_written(x) for x in c.leaves())}

    def repeat(self, step: Callable[[], Any]) -> None:
        """Runs the second step."""
        try:
            step()
        except (Exception, WrittenByUnits):  # what one step leaves may be more than ghosts can show to another one
            return
        self._again = {p: Copy(self._state.get(p)) for p in self.places}

    def written(self, place: StatePlace) -> bool:
        """Returns True if `place` has a tensor that the step writes in place."""
        value = self._after[place].value
        return isinstance(value, torch.Tensor) and place in self._before and value is self._before[place].value

    def _stays(self, place: StatePlace) -> bool:
        again = None if self._again is None else self._again[place]
        new = not self.written(place) and place not in self._written
        return again is not None and new and self._after[place].alike(again, _both_ghosts)

    def overwritten(self, place: StatePlace) -> bool:
        """Returns True if the second step computed the state without values that the first one has left."""
        mine = {id(x) for x in self._after[place].leaves() if isinstance(x, Ghost)}
        return bool(mine) and not mine & self.used and self._stays(place)

    def may_be_cache(self, place: StatePlace) -> bool:
        """Returns True if the second step did not change the state, which has no ghosts."""
        return not any(isinstance(x, Ghost) for x in self._after[place].leaves()) and self._stays(place)

    def caches(self, step: Callable[[], Any]) -> frozenset[StatePlace]:
        """Returns the places that `step`, which runs from the start on other numbers, leaves the same."""
        try:
            step()
        except (Exception, WrittenByUnits):  # numbers that the user's code did not expect
            return frozenset()
        return self._unchanged(p for p in self.places if self.may_be_cache(p))

    def still_caches(self, caches: frozenset[StatePlace], step: Callable[[], Any]) -> frozenset[StatePlace]:
        """Returns which of `caches` are the same after `step`, which reads other values; all if a check in it fails."""
        try:
            step()
        except (Exception, WrittenByUnits):
            return caches
        return self._unchanged(caches)

    def _unchanged(self, places: Iterable[StatePlace]) -> frozenset[StatePlace]:
        return frozenset(p for p in places if self._after[p].alike(Copy(self._state.get(p)), _both_ghosts))


def _both_ghosts(some: torch.Tensor, other: torch.Tensor) -> bool:
    if isinstance(some, Ghost) or isinstance(other, Ghost):
        return type(some) is type(other) and some.shape == other.shape
    return some.shape == other.shape and some.dtype == other.dtype and torch.equal(some, other)


def other_numbers(args: tuple) -> tuple:
    """Returns the arguments of a step with samples in the opposite order, and other numbers in floating point."""

    def other(x: Any) -> Any:
        if type(x) is not torch.Tensor or not x.ndim or x.layout != torch.strided:
            return x
        return x.flip(0) * 1.25 if x.is_floating_point() else x.flip(0)

    return (tree_map(other, args[0]), *args[1:])


class Timeline:
    """Copies of some places before and after every call of a unit in one dry run.

    Args:
        state: The state of the module.
        places: The places.
        written: Written tensors of the dry run.
    """

    def __init__(self, state: ModuleState, places: Sequence[StatePlace], written: WrittenTensors) -> None:
        self._state, self.places, self._written = state, places, written
        self.before = self._copies()
        self.entries: list[dict[StatePlace, Copy]] = []
        self.exits: list[dict[StatePlace, Copy]] = []
        self.after = self.before
        self.where: dict[StatePlace, str] = {}
        self._line = "the step"

    def _copies(self) -> dict[StatePlace, Copy]:
        return {p: Copy(self._state.get(p)) for p in self.places}

    def entered(self) -> None:
        """Called before a unit runs."""
        self.entries.append(self._copies())

    def left(self) -> None:
        """Called after a unit has run."""
        self.exits.append(self._copies())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watches the step, which runs in the context."""
        with user_lines_seen(self._seen):
            yield
        self._seen("")
        self.after = self._copies()
        for place in self.places:
            for statistic in self.statistics(place):
                self.where.setdefault(place, statistic.where)

    def _seen(self, line: str) -> None:
        for place in self.places:
            if place not in self.where and not self.before[place].same_as(Copy(self._state.get(place))):
                self.where[place] = self._line
        self._line = line

    def is_sum(self, place: StatePlace) -> bool:
        """Returns True if the module says that a buffer is a sum over samples, in its attribute `sums_over_samples`."""
        return place.key in getattr(self._state.owner(place), "sums_over_samples", ())

    def statistics(self, place: StatePlace) -> list[Statistic]:
        """Returns the updates of `place` as running statistics."""
        return [s for s in self._written.statistics if s.tensor is self.before[place].value]

    def calls_that_change(self, place: StatePlace) -> list[int]:
        """Returns the calls of units during which the content of `place` changes."""
        both = zip(self.entries, self.exits, strict=True)
        seen = {j for j, (entry, left) in enumerate(both) if not entry[place].same_as(left[place])}
        return sorted(seen | {s.interval for s in self.statistics(place) if s.inside})

    def last_change(self, place: StatePlace) -> int:
        """Returns the last interval after a call of a unit in which code outside of units changes `place`; or -1."""
        following = [*self.entries[1:], self.after]
        both = list(enumerate(zip(self.exits, following, strict=True)))
        seen = next((j for j, (left, entry) in reversed(both) if not left[place].same_as(entry[place])), -1)
        return max([seen, *(s.interval for s in self.statistics(place) if not s.inside)])

    def known(self, place: StatePlace) -> int:
        """Returns the first call from which on `place` is as at the end; the number of calls if there is none."""
        same = [entry[place].same_as(self.after[place]) for entry in self.entries]
        seen = next((c for c in range(len(same)) if all(same[c:])), len(same))
        return max([seen, *(s.interval + 1 for s in self.statistics(place))])


class Learned:
    """The contract of a step, and what follows for its cuts.

    Args:
        timeline: Of the last dry run.
        repeated: Of the first dry runs.
        caches: The places that are only caches.
        calls: The unit of each call.
        units: All units.
        is_written: Returns True for a real tensor that was written with a ghost in the last dry run.
    """

    def __init__(
        self,
        timeline: Timeline,
        repeated: Repeated,
        caches: frozenset[StatePlace],
        calls: Sequence[str],
        units: Sequence[str],
        is_written: Callable[[Any], bool],
    ) -> None:
        self._timeline, self._calls, self._units, self._is_written = timeline, calls, units, is_written
        changes = [(self._change(p, repeated), repeated.overwritten(p)) for p in timeline.places]
        self.contract = StepContract(
            carried=tuple(c for c, fresh in changes if not (fresh and c.in_unit)),
            overwritten=tuple(c for c, fresh in changes if fresh and c.in_unit),
            caches=caches,
        )

    def _change(self, place: StatePlace, repeated: Repeated) -> StateChange:
        timeline = self._timeline
        leaves = list(timeline.after[place].leaves())
        in_unit, written = bool(self._unit_of(place) and timeline.calls_that_change(place)), repeated.written(place)
        return StateChange(
            place=place,
            form=map_leaves(lambda t: t.meta if isinstance(t, Ghost) else t, timeline.after[place].value),
            where=timeline.where.get(place, "the step"),
            in_unit=in_unit,
            written=written,
            summed=in_unit and written and timeline.is_sum(place),
            known=timeline.known(place),
            ghosts=bool(timeline.statistics(place)) or any(isinstance(x, Ghost) or self._is_written(x) for x in leaves),
        )

    def _unit_of(self, place: StatePlace) -> str | None:
        return next((u for u in self._units if place.owner == u or place.owner.startswith(f"{u}.")), None)

    def kept(self, cut: int) -> set[int]:
        """Returns the ids of the ghosts that stages after `cut` still put into state that lives on."""
        found: set[int] = set()
        for change in self.contract.carried:
            entry, after = self._timeline.entries[cut][change.place], self._timeline.after[change.place]
            if not change.in_unit and not entry.same_as(after):
                found |= {x.uid for x in after.leaves() if isinstance(x, Ghost)}
        return found

    def refusal(self, cut: int) -> str | None:
        """Returns why state forbids to cut the step at call `cut`; None if it does not."""
        for change in self.contract.carried:
            place, calls = change.place, self._timeline.calls_that_change(change.place)
            if not calls:
                continue
            unit, inside = self._unit_of(place), sorted({self._calls[j] for j in calls})
            if unit is None and cut > calls[0]:
                return f"{change} inside `{inside[0]}`, which later stages do not run"
            involved = [j for j, name in enumerate(self._calls) if name in (unit, *inside)]
            last = max(involved[-1], self._timeline.last_change(place))
            if unit is not None and involved[0] < cut <= last:
                return f"{change}, which is used or changed both before and after this point"
        return None
