"""Compares the values that a step returns besides its loss, and those that it logs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lightning_hybrid.engine.loss_weights import WEIGHT
from lightning_hybrid.metrics.logs import LogEntry
from lightning_hybrid.metrics.outputs import extras, join
from lightning_hybrid.verification.differences import bound_of
from lightning_hybrid.verification.state import Leaf, leaves_of, relative_of

_COARSE = 0.4
"""Bound in lower precision, whose rounding changes numbers of right answers; a mean over two microbatches in place of a
sum is off by 0.5. Empirical."""
_SMALL = 1e-3
"""Logged values below it are compared as if they were as large: they may be differences of larger ones. Empirical."""


class Reported(NamedTuple):
    """Values that a step has returned and logged, from the batch of a replica."""

    returned: Mapping[str, list[Leaf] | None]
    """Numbers and tensors besides the loss and its weight, by place."""
    logged: Sequence[tuple[str, float]]
    """Names and values, in the order of the calls. Objects of torchmetrics are not among them: they are state."""


def reported(outs: Sequence[Any], samples: Sequence[int], entries: Iterable[LogEntry]) -> Reported:
    """Returns the values that a step has returned and logged.

    Args:
        outs: What the step has returned for each part of the batch.
        samples: The number of samples of each part.
        entries: What it has logged, reduced over the parts.
    """
    joined = join([extras(out) for out in outs], list(samples))
    returned = {f"training_step[{key!r}]": leaves_of(value) for key, value in joined.items() if key != WEIGHT}
    return Reported(returned, logged(entries))


def logged(entries: Iterable[LogEntry]) -> list[tuple[str, float]]:
    """Returns the names and values of reduced entries."""
    return [
        (e.name, float(e.value) / ((e.weight or 1.0) if e.reduction == "mean" else 1.0))
        for e in entries
        if e.reduction != "metric"
    ]


def unequal_returned(found: Reported, expected: Reported, bound: float) -> dict[str, str]:
    """Returns how the values that a step returns differ from those of one process, by place.

    Args:
        found: What the step reports under the layout.
        expected: What it reports in one process.
        bound: Bound of relative differences for the precision of the run.
    """
    unequal = {}
    for place in {**found.returned, **expected.returned}:
        mine, others = found.returned.get(place) or [], expected.returned.get(place) or []
        if [leaf.shape for leaf in mine] != [leaf.shape for leaf in others]:
            unequal[place] = f"has shape {_shapes(mine)}, in one process {_shapes(others)}"
            continue
        worst = max((relative_of(a, b) for a, b in zip(mine, others, strict=True)), default=0.0)
        if not worst <= _loosened(bound):
            unequal[place] = f"differs by {worst:.2g} of its size"
    return unequal


def unequal_logs(found: Reported, expected: Reported, bound: float) -> dict[str, str]:
    """Returns how the values that a step logs differ from those of one process, by name. Arguments as above."""
    unequal = {}
    for name in dict.fromkeys(n for n, _ in (*found.logged, *expected.logged)):
        mine, others = (sorted(v for n, v in r.logged if n == name) for r in (found, expected))
        same = len(mine) == len(others) and all(_alike(a, b, bound) for a, b in zip(mine, others, strict=True))
        if not same:
            unequal[name] = f"is {_numbers(mine)}, in one process {_numbers(others)}"
    return unequal


def _alike(found: float, expected: float, bound: float) -> bool:
    if not math.isfinite(expected):
        return not math.isfinite(found)
    return abs(found - expected) <= _loosened(bound) * max(abs(expected), _SMALL)


def _loosened(bound: float) -> float:
    return bound if bound <= bound_of(torch.float32) else max(bound, _COARSE)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values) or "not logged"


def _shapes(leaves: Sequence[Leaf]) -> str:
    shapes = Counter(leaf.shape for leaf in leaves)
    return ", ".join(f"{count} x {shape}" if count > 1 else str(shape) for shape, count in shapes.items()) or "none"
