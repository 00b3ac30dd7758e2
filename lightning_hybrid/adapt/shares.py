"""Who takes how much: samples for ranks of different speed, sequences of different length for equal ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def share_by_speed(seconds: Sequence[float], parts: int, most: int | None = None) -> list[int]:
    """Deals equal parts to ranks so that the last one to end ends as early as can be.

    The next part goes to the rank r with the smallest (n_r + 1) t_r, which is optimal for whole parts. Every rank gets
    at least one, since all take part in every step.

    Args:
        seconds: t_r, of one part on each rank.
        parts: How many there are.
        most: No rank gets more.

    Raises:
        ValueError: If there are fewer parts than ranks, or more than `most` allows.
    """
    ranks = len(seconds)
    if not ranks <= parts <= ranks * (most or parts):
        raise ValueError(f"`parts` must be at least the {ranks} ranks and at most what they may take. Got {parts}.")
    counts = [1] * ranks
    heap = [(2 * t, r) for r, t in enumerate(seconds)]
    heapq.heapify(heap)
    for _ in range(parts - ranks):
        _, rank = heapq.heappop(heap)
        counts[rank] += 1
        if most is None or counts[rank] < most:
            heapq.heappush(heap, ((counts[rank] + 1) * seconds[rank], rank))
    return counts


def sequence_cost(length: int, width: int) -> float:
    """What a sequence of L tokens costs a Transformer of width h, up to a factor: 6 h L + L^2.

    Reference: Narayanan et al. (2021), appendix: 72 b s l h^2 (1 + s / 6h) FLOPs a block, divided by 12 h.
    """
    return 6.0 * width * length + float(length) ** 2


def pack(costs: Sequence[float], bins: int, capacity: int | None = None) -> list[list[int]]:
    """Divides items so that the most expensive bin is as cheap as can be: the largest first, into the cheapest bin.

    Args:
        costs: Of the items.
        bins: How many bins.
        capacity: No bin gets more items.

    Returns:
        By bin, the numbers of its items.

    Raises:
        ValueError: If the bins have no room.

    Reference: Graham, "Bounds on Multiprocessing Timing Anomalies" (1969): at most 4/3 - 1/(3 bins) of the best.
    """
    if capacity is not None and bins * capacity < len(costs):
        raise ValueError(f"{bins} bins of {capacity} items have no room for {len(costs)}.")
    heap = [(0.0, 0, b) for b in range(bins)]
    found: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, count, b = heapq.heappop(heap)
        found[b].append(item)
        if capacity is None or count + 1 < capacity:
            heapq.heappush(heap, (total + costs[item], count + 1, b))
    return found
