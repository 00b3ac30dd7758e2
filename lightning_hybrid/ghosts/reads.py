"""Reads of values that ghosts do not have: what they return, and whether they decide anything.

User code reads values to check, print and log them, and to decide what to compute. A dry run returns a value with
which the checks pass: if the step fails after a read, the dry run is repeated with another value at that place. A read
decides nothing if other values change neither the data flow of the step, nor its result, nor the state of the module,
except that checks (`raise` and `assert`) fail. Stages that do not have the tensor return the same value to such a read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_hybrid._torch_private import explicitly_raised, read_site, user_location, user_location_in
from lightning_hybrid.ghosts.ghost import Ghost, GhostObserver, GhostReadError, GhostWriteError
from lightning_hybrid.spec.code import module_of
from lightning_hybrid.spec.errors import PartitionError

_aten = torch.ops.aten
_TRUE = {_aten.all, _aten.equal, _aten.isfinite, _aten.isclose}
"""Operators whose result is True where a check passes; the truth of others, such as `any` and `isnan`, is False."""
_REPETITIONS = 12
"""Largest number of dry runs to find values with which all checks pass. Empirical."""
_PLACES = 16
"""Places whose values are changed one by one, where all at once change something; all others are taken to decide.
Empirical."""
_SUMMED = 4096
"""Largest number of elements of real tensors that are compared by value. Empirical."""
_DEPTH = 4
"""Containers in containers that are compared."""


def _values_like(ghost: Ghost) -> tuple[Any, ...]:
    """Returns values that a read may return, the one with which checks pass most often first."""
    if ghost.dtype == torch.bool:
        first = ghost.made_by in _TRUE
        return first, not first
    if ghost.dtype.is_complex:
        return 1 + 0j, 0j
    return (1.0, 0.25, 0.0, -1e6, 1e6) if ghost.dtype.is_floating_point else (1, 0, 2, 1000)


@dataclass
class _Place:
    values: tuple[Any, ...]
    location: str
    chosen: int = 0


@dataclass
class Reads:
    """Values that reads return, by place in the code; equal in all repetitions of a dry run unless they are changed."""

    places: dict[str, _Place] = field(default_factory=dict)
    order: dict[str, None] = field(default_factory=dict)
    """The places that the present dry run has read, in the order of their last reads."""
    deciding: set[str] = field(default_factory=set)
    """Places whose values decide what the step computes."""

    def value(self, ghost: Ghost) -> tuple[str, Any]:
        """Returns the place in the code that reads `ghost` now, and the value for it."""
        place = read_site()
        found = self.places.setdefault(place, _Place(_values_like(ghost), user_location()))
        self.order.pop(place, None)
        self.order[place] = None
        return place, found.values[found.chosen]

    def answers(self) -> dict[str, Any]:
        """Returns the value at every place that decides nothing."""
        return {p: self.places[p].values[self.places[p].chosen] for p in self.order if p not in self.deciding}

    def until_it_runs(self, run: Callable[[], Any]) -> Any:
        """Returns `run()`, repeated with other values at the places that it has read until it raises nothing.

        Raises:
            Exception: What `run` has raised first, if no values help.
        """
        first, failure = None, None
        options: Iterator[str] = iter(())
        for _ in range(_REPETITIONS):
            try:
                return run()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of any class: user code has run on made-up values
                first, now = first or error, (type(error), user_location_in(error.__traceback__), len(self.order))
            if now != failure:  # it has failed for the first time, or got further
                failure, options = now, self._options(list(self.order))
            if next(options, None) is None:
                break
        raise first or RuntimeError("`run` was not called")

    def _options(self, order: list[str]) -> Iterator[str]:
        """Changes the values at one place after the other, truth values and last reads first."""
        for place in sorted(reversed(order), key=lambda p: len(self.places[p].values)):
            found = self.places[place]
            before = found.chosen
            for offset in range(1, len(found.values)):
                found.chosen = (before + offset) % len(found.values)
                yield place
            found.chosen = before

    def others(self) -> Iterator[None]:
        """Gives all numbers that the last dry run has read other values, then all truth values; yields after each.

        At the end, the values are as before. A caller that stops keeps them.
        """
        for truth in (False, True):
            places = [p for p in map(self.places.__getitem__, self.order) if isinstance(p.values[0], bool) == truth]
            kept = [place.chosen for place in places]
            for place in places:
                place.chosen = (place.chosen + 1) % len(place.values)
            if places:
                yield
            for place, chosen in zip(places, kept, strict=True):
                place.chosen = chosen

    def find_deciding(self, run: Callable[[], Any], expected: Any) -> None:
        """Finds the places whose values change the summary of a run; see `Summary`.

        Args:
            run: Repeats the dry run; returns its summary.
            expected: The summary with the present values.
        """
        places = [p for p in self.order if p not in self.deciding]
        kept = {p: self.places[p].chosen for p in places}
        if not self._decide_nothing(places, run, expected):
            single = [p for p in places[:_PLACES] if self._decide_nothing([p], run, expected)]
            self.deciding.update(p for p in places if p not in single)
        for place, chosen in kept.items():
            self.places[place].chosen = chosen
        self.order = dict.fromkeys([*kept, *self.deciding])

    def _decide_nothing(self, places: list[str], run: Callable[[], Any], expected: Any) -> bool:
        """Returns True if other values at `places` change nothing, except that checks fail."""
        for offset in range(1, max((len(self.places[p].values) for p in places), default=1)):
            changed = [p for p in places if offset < len(self.places[p].values)]
            same: bool | None = None
            while changed and same is None:
                same = self._is_same(changed, offset, run, expected)
            if same is False:
                return False
        return True

    def _is_same(self, places: list[str], offset: int, run: Callable[[], Any], expected: Any) -> bool | None:
        """Runs with other values at `places`; returns None after removing a place whose check has failed."""
        kept = {p: self.places[p].chosen for p in places}
        for place, chosen in kept.items():
            self.places[place].chosen = (chosen + offset) % len(self.places[place].values)
        try:
            return bool(run() == expected)
        except Exception as error:  # a check that fails, or code that cannot run on this value
            if not explicitly_raised(error):
                return False
            failed = next((p for p in reversed(self.order) if p in places), None)
        finally:
            for place, chosen in kept.items():
                self.places[place].chosen = chosen
        if failed is None or (len(places) > 1 and self._is_same([failed], offset, run, expected) is False):
            return False
        places.remove(failed)
        return None


class AnsweredReads(GhostObserver):
    """Answers reads on a stage that does not have the tensor, where they decide nothing."""

    def __init__(self) -> None:
        self.answers: Mapping[str, Any] = {}
        """Values by place, from the dry run of the running step."""

    def read(self, ghost: Ghost) -> Any:
        """Returns the value of the dry run.

        Raises:
            GhostReadError: If the read decides something, or was not part of the dry run.
        """
        place = read_site()
        return self.answers[place] if place in self.answers else super().read(ghost)

    def shaped_by(self, ghost: Ghost) -> None:
        """Raises a GhostReadError."""
        super().read(ghost)


class StageObserver(AnsweredReads):
    """Observes the ghosts of a pipeline stage."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed_writes: frozenset[str] = frozenset()
        """Lines whose writes into real tensors belong to other stages; no later code of this stage uses the tensors."""
        self.gradients = False
        self.reworded = False
        """True while errors are reworded by who runs the user's code: in a step, and in hooks."""
        self.fetch: Callable[[], Any] | None = None
        """Returns a value that is read from the stage that has it, where all stages run the same code."""

    def read(self, ghost: Ghost) -> Any:
        """Returns the value of another stage, if all run the same code, and otherwise that of the dry run.

        Raises:
            GhostReadError: If the read decides something, or was not part of the dry run.
            PartitionError: The same, outside of steps and hooks.
        """
        with self._worded():
            return super().read(ghost) if self.fetch is None else self.fetch()

    def shaped_by(self, ghost: Ghost) -> None:
        """Raises as `read` does."""
        with self._worded():
            super().shaped_by(ghost)

    def written(self, func: Any, target: torch.Tensor) -> None:
        """Ignores the write if it belongs to another stage."""
        if user_location() not in self.allowed_writes:
            with self._worded():
                super().written(func, target)

    @contextmanager
    def _worded(self) -> Iterator[None]:
        try:
            yield
        except (GhostReadError, GhostWriteError) as error:
            if self.reworded:
                raise
            raise PartitionError(
                f"`layout` divides the weights into pipeline stages, and user code needs one of another "
                f"stage: {error} Use `strategy.full_state_dict()`, or a layout without `pp`, such as 'dp2'."
            ) from error


class Summary:
    """Records the operations of a dry run after its first read, to compare them with those of another dry run."""

    def __init__(self) -> None:
        self._parts: list[Any] = []

    def add(self, kind: Any, *values: Any) -> None:
        """Adds an operator, a call or a result, with everything that it depends on."""
        self._parts.append((str(kind), [_summary(v) for v in values]))

    def add_state(self, modules: Iterable[nn.Module]) -> None:
        """Adds the attributes and buffers of `modules`."""
        for module in modules:
            self._parts.append({k: _summary(v) for k, v in vars(module).items() if k != "_modules"})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Summary) and self._parts == other._parts

    __hash__ = None  # type: ignore[assignment] -- it changes


def _summary(value: Any, depth: int = _DEPTH) -> Any:
    if isinstance(value, Ghost):
        return "ghost", value.uid, tuple(value.shape)
    if isinstance(value, torch.Tensor):
        known = type(value) is torch.Tensor and value.device.type != "meta" and value.numel() <= _SUMMED
        return tuple(value.shape), repr(value.detach().double().sum().item()) if known else None
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return repr(value)
    if depth and isinstance(value, Mapping):
        return [(repr(k), _summary(v, depth - 1)) for k, v in value.items()]
    if depth and isinstance(value, Iterable) and module_of(type(value)) in ("builtins", "collections"):
        return [_summary(v, depth - 1) for v in value]
    return type(value).__name__
