"""Numbers and tensors in the state of modules, to compare the state of replicas, and that of different layouts."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_hybrid._torch_private import is_plain
from lightning_hybrid.collectives import to_local
from lightning_hybrid.ghosts.contract import StatePlace
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.objects import Copy
from lightning_hybrid.ghosts.state import MISSING, ModuleState
from lightning_hybrid.replicas.written import alike, sums_of


class Leaf(NamedTuple):
    """A number or tensor in the state; a number is a tensor without dimensions."""

    shape: tuple[int, ...]
    sums: tuple[float, ...]
    pooled: bool
    """True for a tensor with dimensions in a container, such as a pool of earlier outputs."""


_UNKNOWN = Leaf((-1,), (0.0, 0.0, 0.0), pooled=False)
"""A tensor without memory, such as the value of one microbatch, or of another layout than strided."""
State = dict[StatePlace, list[Leaf] | None]
"""The changed state by place; None for removed attributes."""


def leaves_of(value: Any) -> list[Leaf] | None:
    """Returns the numbers and tensors in `value`; None for state that does not exist."""
    if value is MISSING:
        return None
    leaves = [(leaf, _as_tensor(leaf)) for leaf in Copy(value).leaves()]
    return [
        Leaf(tuple(t.shape), sums_of(t), x is not value and t.ndim > 0) if is_plain(t) else _UNKNOWN
        for x, t in leaves
        if t is not None
    ]


def changed_leaves(state: ModuleState, before: dict[StatePlace, Copy]) -> State:
    """Returns what is now at the places whose content is not that of `before`."""
    return {place: leaves_of(state.get(place)) for place in state.changed(before)}


def differing(replicas: Sequence[list[Leaf]]) -> list[Leaf]:
    """Returns the leaves that differ between replicas; all if the replicas have other numbers of leaves."""
    if len({len(leaves) for leaves in replicas}) > 1:
        return [leaf for leaves in replicas for leaf in leaves]
    return [
        leaf
        for leaf, *others in zip(*replicas, strict=True)
        if any(leaf.shape != o.shape for o in others) or not alike(leaf.shape, [leaf.sums, *(o.sums for o in others)])
    ]


def largest_difference(found: State, expected: State) -> tuple[float, StatePlace | None]:
    """Returns the largest relative difference of a sum, and its place; infinity where the structure differs.

    Tensors of other shapes are parts of those of one process, and not compared.
    """
    worst: tuple[float, StatePlace | None] = (0.0, None)
    for place in {**found, **expected}:
        mine, others = found.get(place), expected.get(place)
        if mine is None or others is None:  # not every write in place is seen, such as those of BatchNorm
            value = math.inf if all(leaf.shape == () for leaf in mine or others or [_UNKNOWN]) else 0.0
        elif len(mine) != len(others):
            value = math.inf
        else:
            value = max((relative_of(a, b) for a, b in zip(mine, others, strict=True)), default=0.0)
        worst = max(worst, (value, place), key=lambda difference: difference[0])
    return worst


def relative_of(found: Leaf, expected: Leaf) -> float:
    """Returns the relative difference of two leaves; 0 if their shapes differ, infinity if one only is not finite."""
    if found.shape != expected.shape or found.sums == expected.sums:
        return 0.0
    if not all(map(math.isfinite, (*found.sums, *expected.sums))):
        return 0.0 if not math.isfinite(found.sums[-1]) and not math.isfinite(expected.sums[-1]) else math.inf
    # the weights of the second sum are up to the root of the number of elements
    scale = max(found.sums[-1], expected.sums[-1]) * math.prod(expected.shape) ** 0.5
    return max(abs(a - b) for a, b in zip(found.sums[:2], expected.sums[:2], strict=True)) / scale


def _code(item: Any) -> float:
    """Returns a number for an item of a set, equal on all ranks for equal numbers and texts; 0 for other items."""
    if isinstance(item, int | float):
        return float(item)
    return float(zlib.crc32(str(item).encode())) if isinstance(item, str | tuple) else 0.0


def _as_tensor(leaf: Any) -> Tensor | None:
    if isinstance(leaf, set | frozenset):
        return torch.tensor(sorted(_code(item) for item in leaf), dtype=torch.float64)
    if isinstance(leaf, bool) or not isinstance(leaf, int | float | np.ndarray | Tensor):
        return None
    if isinstance(leaf, Ghost):
        return leaf  # of another stage, or of one microbatch: its value cannot be read
    if isinstance(leaf, Tensor):
        return to_local(leaf.detach())
    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(leaf)) if leaf.dtype.kind in "fiu" else None
    return torch.tensor(float(leaf), dtype=torch.float64)
