"""Which elements of a tensor go from which rank to which, so that every rank has its new part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from lightning_hybrid.spec.tensor_index import Index, Run


class Transfer(NamedTuple):
    """A box of a whole tensor that one rank has and another one lacks, or that a rank has itself."""

    source: int
    """The rank that has it."""
    target: int
    """The rank that gets it; the same one where it keeps it."""
    box: Index
    """One run along each dim, which lies in one run of the source's part and of the target's."""

    @property
    def count(self) -> int:
        """The number of elements."""
        count = 1
        for ((start, stop),) in self.box:
            count *= stop - start
        return count


@lru_cache(maxsize=4096)
def transfers(old: tuple[Index | None, ...], new: tuple[Index | None, ...]) -> tuple[Transfer, ...]:
    """Fills the new parts from the old ones: what a rank has stays there, everything else is sent once.

    A rank takes from its own part first, and what it lacks from one of the holders: the one that has sent least so far,
    of these the nearest by rank. The same on every rank, without a word between them.

    Args:
        old: By rank, which part it has; None: nothing.
        new: By rank, which part it is to have.

    Raises:
        ValueError: If elements that a rank is to have are nowhere.
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
                raise ValueError(f"Rank {rank} is to have {box}, which no rank has.")
            source = rank if rank in holders else min(holders, key=lambda h: (sent[h], abs(h - rank)))
            step = Transfer(source, rank, box)
            sent[source] += step.count if source != rank else 0
            found.append(step)
    return tuple(found)


class _Cover:
    """Which segments of each dim a part has."""

    def __init__(self, index: Index, segments: Sequence[Sequence[Run]]) -> None:
        self._dims = [
            {i for i, (a, b) in enumerate(runs) if any(start <= a and b <= stop for start, stop in index[dim])}
            for dim, runs in enumerate(segments)
        ]

    def has(self, atom: Sequence[int]) -> bool:
        return all(i in dim for i, dim in zip(atom, self._dims, strict=True))


def _segments(parts: Sequence[Sequence[Run]]) -> list[Run]:
    """The pieces into which the ends of all runs cut a dim."""
    cuts = sorted({end for runs in parts for run in runs for end in run})
    return list(itertools.pairwise(cuts))
