"""Division of samples among ranks of different speed, and of sequences of different length among equal ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def share_by_speed(seconds: Sequence[float], parts: int, most: int | None = None) -> list[int]:
    """Divides equal parts among ranks so that the maximum of n_r t_r is minimal.

    The next part goes to the rank r with the smallest (n_r + 1) t_r, which is optimal for whole parts. Every rank gets
    at least one part, since all ranks take part in every step.

    Args:
        seconds: t_r, the time of one part on each rank.
        parts: Number of parts.
        most: Upper limit of the parts of a rank.

    Returns:
        n_r, the number of parts of each rank.

    Raises:
        ValueError: If there are fewer parts than ranks, or more than `most` allows.
    """
    ranks = len(seconds)
    if not ranks <= parts <= ranks * (most or parts):
        raise ValueError(f"`parts` must be at least the {ranks} ranks and at most {ranks} * `most`. Got {parts}.")
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
    """Returns the relative cost of a sequence of L tokens in a transformer of width h: 6 h L + L^2.

    Reference: Narayanan et al. (2021), appendix: 72 b s l h^2 (1 + s / 6h) FLOPs per block, divided by 12 h.
    """
    return 6.0 * width * length + float(length) ** 2


def pack(costs: Sequence[float], bins: int, capacity: int | None = None) -> list[list[int]]:
    """Packs items into bins so that the maximum cost of a bin is small: largest item first, into the cheapest bin.

    Args:
        costs: Costs of the items.
        bins: Number of bins.
        capacity: Upper limit of the items of a bin.

    Returns:
        By bin, the indices of its items.

    Raises:
        ValueError: If the items exceed the capacity of the bins.

    Reference: Graham, "Bounds on Multiprocessing Timing Anomalies" (1969): at most 4/3 - 1/(3 bins) times the optimum.
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
