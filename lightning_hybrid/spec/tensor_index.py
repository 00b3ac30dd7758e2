"""Index of a rank's part of a whole tensor, and overlaps of two parts.

A part is described per dim by the runs of indices of the whole tensor that it contains, in the order of the part.
`((0, 4),), ((8, 12), (0, 4))` is rows 0 to 3 of columns 8 to 11, then of columns 0 to 3. Sharded replicas, tensor
parallelism and permuted weights (fused q-k-v) all have this form, so any part can be filled from any others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Run = tuple[int, int]
"""Start and stop of consecutive indices."""
Index = tuple[tuple[Run, ...], ...]
"""For each dim, the runs of indices of a part."""


def whole_index(shape: Sequence[int]) -> Index:
    """Returns the index of the whole tensor."""
    return tuple(((0, size),) if size else () for size in shape)


def runs_of(indices: Sequence[int]) -> tuple[Run, ...]:
    """Groups indices into runs: `[4, 5, 6, 0, 1]` is `((4, 7), (0, 2))`."""
    if isinstance(indices, range) and indices.step == 1:
        return ((indices.start, indices.stop),) if len(indices) else ()
    runs: list[Run] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return tuple(runs)


def shape_of(index: Index) -> tuple[int, ...]:
    """Returns the shape of a part."""
    return tuple(sum(stop - start for start, stop in runs) for runs in index)


class Overlap(NamedTuple):
    """A box that two parts share, as slices into each."""

    target: tuple[slice, ...]
    source: tuple[slice, ...]

    @property
    def count(self) -> int:
        """The number of elements."""
        count = 1
        for part in self.target:
            count *= part.stop - part.start
        return count


def overlaps(target: Index, source: Index) -> Iterator[Overlap]:
    """Yields all boxes that `target` and `source` have in common.

    Args:
        target: Index of the part to fill.
        source: Index of the available part; the same number of dims.
    """
    for boxes in itertools.product(*(_common(t, s) for t, s in zip(target, source, strict=True))):
        yield Overlap(tuple(t for t, _ in boxes), tuple(s for _, s in boxes))


def _common(target: Sequence[Run], source: Sequence[Run]) -> list[tuple[slice, slice]]:
    found = []
    for (t_start, t_stop), t_offset in _placed(target):
        for (s_start, s_stop), s_offset in _placed(source):
            start, stop = max(t_start, s_start), min(t_stop, s_stop)
            if start < stop:
                t, s, length = t_offset + start - t_start, s_offset + start - s_start, stop - start
                found.append((slice(t, t + length), slice(s, s + length)))
    return found


def _placed(runs: Sequence[Run]) -> Iterator[tuple[Run, int]]:
    offset = 0
    for run in runs:
        yield run, offset
        offset += run[1] - run[0]
