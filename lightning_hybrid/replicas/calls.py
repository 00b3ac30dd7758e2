"""Decides which blocks `fsdp` gathers by themselves: those that every replica calls alike in each step.

Where replicas call different blocks (a head per task, LayerDrop, a part that one batch does not need), the collectives
of different blocks would meet. The weights of such blocks belong to the group of the whole step, which every replica
gathers and reduces once a step, whether it uses them or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepCalls:
    """The calls of units in the dry runs of one replica's first step."""

    runs: tuple[tuple[str, ...], ...] = ()
    """Names of the called units, in order, by dry run; several runs if the step draws random numbers."""
    read_outside: frozenset[str] = frozenset()
    """Units whose weights are read by code outside the unit."""
    written: Mapping[str, str] = field(default_factory=dict)
    """The line that writes each parameter which the step writes, by name."""
    problem: str | None = None
    """The error of a dry run that has failed."""


def alike_on_all(found: Sequence[StepCalls], blocks: Iterable[str], classes: Mapping[str, str]) -> list[str]:
    """Returns the blocks that are called on all replicas alike; none of them if a dry run has failed.

    Args:
        found: The calls of all ranks.
        blocks: Names of blocks.
        classes: The class of each unit. Of a stack with a block that is not called alike, all blocks of this class
            count as not called alike: another batch may leave out another one.
    """
    if any(calls.problem is not None for calls in found):
        return []
    runs = [list(run) for calls in found for run in calls.runs]
    excluded = different_units(runs) | {name for calls in found for name in calls.read_outside}
    called = set().union(*runs)
    excluded |= {block for block in blocks if block not in called}
    stacks = {(name.rpartition(".")[0], classes.get(name)) for name in excluded}
    return [b for b in blocks if (b.rpartition(".")[0], classes.get(b)) not in stacks]


def different_units(runs: Sequence[Sequence[str]]) -> set[str]:
    """Returns units without whose calls all sequences of calls are equal."""
    counts = [Counter(run) for run in runs]
    different = {name for name in set().union(*counts) if len({count[name] for count in counts}) > 1}
    while True:
        rest = [[name for name in run if name not in different] for run in runs]
        moved = next(({*names} for names in zip(*rest, strict=True) if len({*names}) > 1), None)
        if moved is None:
            return different
        different |= moved


def problem_of(found: Collection[StepCalls]) -> str | None:
    """Returns the first error of a dry run."""
    return next((calls.problem for calls in found if calls.problem is not None), None)
