"""The contract of a step: which state of the module it changes, where in the user's code, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class StatePlace(NamedTuple):
    """A place that holds state: an attribute or a buffer of a module, an attribute of a class, or a variable."""

    owner: str
    """Name of the module; `class NAME` for an attribute of a class of the user, `module NAME` for a
    global variable, and `function NAME` for a variable of an enclosing function."""
    key: str

    def __str__(self) -> str:
        return f"{self.owner}.{self.key}" if self.owner else self.key


@dataclass(frozen=True, kw_only=True)
class StateChange:
    """State that a step leaves different from what it was."""

    place: StatePlace
    where: str
    """The line of the user's code, as `file.py:12 (function)`."""
    in_unit: bool
    """True if calls of the unit that has the state change it; it then belongs to the stage of the unit."""
    written: bool
    """True for a tensor that is written in place."""
    known: int
    """From this call of a unit on, the state is as at the end of the step. The number of calls: only at the end."""
    ghosts: bool
    """True if the state holds values that a unit has computed."""
    form: Any = field(default=None, compare=False, repr=False)
    """The value after the step in a dry run, with meta tensors in place of ghosts."""
    summed: bool = False
    """True for a tensor in a unit to which each call adds a sum over its samples, by the word of the module."""

    def __str__(self) -> str:
        return f"{self.where} changes `{self.place}`"


@dataclass(frozen=True, kw_only=True)
class StepContract:
    """What is known of a step besides its data flow."""

    carried: tuple[StateChange, ...] = ()
    """State that the next step, or user code after the step, finds changed."""
    overwritten: tuple[StateChange, ...] = ()
    """State inside of units that every call computes anew, from nothing of the call before."""
    weights: tuple[tuple[str, str], ...] = ()
    """Weights that the step writes, each with the line of the user's code."""
    indivisible: str | None = None
    """Why parts of a batch do not run as the whole does: they call other modules, or fail; None: they do."""
    decided_at: str | None = None
    """The line that reads a value computed from the whole batch, and decides by it what the step computes."""
    caches: frozenset[StatePlace] = frozenset()
    """State that the step changes only once, to the same whatever the batch holds."""

    @property
    def of_batch(self) -> tuple[StateChange, ...]:
        """Changes that microbatches would not make as the whole batch does."""
        return tuple(change for change in self.carried if not change.summed)

    @property
    def changes(self) -> tuple[StateChange, ...]:
        """All changes but those of caches."""
        return (*self.carried, *self.overwritten)
