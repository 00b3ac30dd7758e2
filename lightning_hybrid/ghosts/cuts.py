"""Finds the values that cross at each cut of a step, from the record of its dry run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lightning_hybrid._torch_private import storage_key
from lightning_hybrid.ghosts.record import CrossingValue, Cut, Source


@dataclass
class Value:
    """A ghost that the step has made."""

    uid: int
    birth: int
    """The interval that has made the value."""
    meta: torch.Tensor
    inside_unit: bool
    location: str
    last_use: int = -2
    last_write: int = -2

    @property
    def storage(self) -> int:
        """The storage, which views share."""
        return storage_key(self.meta)


@dataclass(frozen=True, kw_only=True)
class ValueFlow:
    """What a dry run has recorded of the values of a step."""

    names: Sequence[str]
    """The unit of each call."""
    values: Sequence[Value]
    sources: Mapping[int, Source]
    """The names of values, by uid."""
    arguments: Sequence[Mapping[int, int]]
    """For each call, the leaf of its arguments that each value is, by uid."""
    reads: Sequence[tuple[int, str]]
    """Intervals and places that read the value of a tensor, where it decides what the step computes."""
    told: Mapping[int, str]
    """Calls of units that have read values of tensors and told later code more than tensors, with the unit's name."""
    refusals: Mapping[int, str] = field(default_factory=dict)
    """Why state of the module forbids cuts, by cut."""
    kept: Mapping[int, Collection[int]] = field(default_factory=dict)
    """By cut, the uids of values that the step still puts into state after it."""


def find_cuts(flow: ValueFlow) -> dict[int, Cut]:
    """Returns the cuts of a step by the index of the call at whose entry it is cut."""
    written: dict[int, int] = {}
    for value in flow.values:
        written[value.storage] = max(written.get(value.storage, -2), value.last_write)
    return {c: _cut(flow, c, written) for c in range(1, len(flow.names))}


def _cut(flow: ValueFlow, c: int, written: Mapping[int, int]) -> Cut:
    """Returns the cut before call `c`; `written` has the interval of the last write to each storage."""
    refusal = _early_refusal(flow, c)
    if refusal is not None:
        return Cut(refusal=refusal)
    kept = flow.kept.get(c, ())
    crossing = [value for value in flow.values if value.birth < c and (c <= value.last_use or value.uid in kept)]
    views = Counter(value.storage for value in crossing)
    found = []
    for value in crossing:
        if value.uid in flow.arguments[c]:
            source: Source = ("arg", c, flow.arguments[c][value.uid])
        elif value.uid in flow.sources:
            source = flow.sources[value.uid]
        elif value.inside_unit:
            name = flow.names[value.birth]
            return Cut(refusal=f"a tensor computed inside `{name}` is used later but is not part of its result")
        else:
            return Cut(refusal=f"a tensor computed at {value.location}, outside any module, is used later")
        writes = written[value.storage] >= c
        if writes and views[value.storage] > 1:
            return Cut(refusal="a tensor is written in place later, of which another view is used later, too")
        shape, dtype = tuple(value.meta.shape), value.meta.dtype
        found.append(CrossingValue(source=source, shape=shape, dtype=dtype, written=writes))
    return Cut(values=tuple(found))


def _early_refusal(flow: ValueFlow, c: int) -> str | None:
    where = next((where for interval, where in flow.reads if interval < c), None)
    if where is not None:
        return f"{where} reads the value of a tensor before this point, which later stages cannot"
    name = next((name for call, name in flow.told.items() if call < c), None)
    if name is not None:
        return f"`{name}` reads values of tensors, and tells later code numbers or other values that depend on them"
    return flow.refusals.get(c)
