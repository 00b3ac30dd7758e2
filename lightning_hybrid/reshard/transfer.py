"""Computes which elements of a tensor each rank sends to which rank, so that every rank gets its new part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from lightning_hybrid.spec.tensor_index import Index, Run


class Transfer(NamedTuple):
    """A box of a whole tensor that one rank sends to another, or that a rank keeps."""

    source: int
    """Rank that has the box."""
    target: int
    """Rank that gets the box; equal to `source` if the rank keeps its elements."""
    box: Index
    """Bounds of the box: one run along each dim, within one run of the source's part and of the target's."""

    @property
    def count(self) -> int:
        """Number of elements."""
        count = 1
        for ((start, stop),) in self.box:
            count *= stop - start
        return count


@lru_cache(maxsize=4096)
def transfers(old: tuple[Index | None, ...], new: tuple[Index | None, ...]) -> tuple[Transfer, ...]:
    """Returns the transfers that fill the new parts: elements that a rank has stay there, all others are sent once.

    A rank copies from its own part first, and receives missing elements from the holder that has sent least so far, of
    these the nearest by rank. The result is the same on every rank, without communication.

    Args:
        old: The part that each rank has, by rank; None: no part.
        new: The part that each rank needs, by rank; None: no part.

    Raises:
        ValueError: If no rank has elements that a rank needs.
    """
    sent = [0] * len(old)
    found: list[Transfer] = []
    places = [i for i in (*old, *new) if i is not None]
    if not places:
        return ()
    segments = [_segments([index[dim] for index in places]) for dim in range(len(places[0]))]
    before, after = ([_Cover(i, segments) if i is not None else None for i in indices] for indices in (old, new))
    for atom in itertools.product(*(range(len(s)) for s in segments)):
        holders = [rank for rank, cover in enumerate(before) if cover is not None and cover.has(atom)]
        box = tuple((segment[i],) for segment, i in zip(segments, atom, strict=True))
        for rank, cover in enumerate(after):
            if cover is None or not cover.has(atom):
                continue
            if not holders:
                raise ValueError(f"Rank {rank} needs {box}, which no rank has.")
            source = rank if rank in holders else min(holders, key=lambda h: (sent[h], abs(h - rank)))
            step = Transfer(source, rank, box)
            sent[source] += step.count if source != rank else 0
            found.append(step)
    return tuple(found)


class _Cover:
    """Segments of each dim that a part covers."""

    def __init__(self, index: Index, segments: Sequence[Sequence[Run]]) -> None:
        self._dims = [
            {i for i, (a, b) in enumerate(runs) if any(start <= a and b <= stop for start, stop in index[dim])}
            for dim, runs in enumerate(segments)
        ]

    def has(self, atom: Sequence[int]) -> bool:
        return all(i in dim for i, dim in zip(atom, self._dims, strict=True))


def _segments(parts: Sequence[Sequence[Run]]) -> list[Run]:
    """Returns the segments into which the ends of all runs cut a dim."""
    cuts = sorted({end for runs in parts for run in runs for end in run})
    return list(itertools.pairwise(cuts))
