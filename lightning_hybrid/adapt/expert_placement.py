"""Placement of experts on ranks, by the tokens routed to them.

Every rank of the `ep` axis has the same number of places. An expert with many tokens may be replicated on several
ranks, which share its tokens. The cost of a step is the largest load of a rank over the mean (`imbalance`).

Reference: DeepSeek-AI, "Expert Parallelism Load Balancer" (2025): replicate the expert with the largest load per place
(`replica_counts`), then pack greedily (`place_experts`). Difference: no rank gets an expert twice.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence


def replica_counts(loads: Sequence[float], places: int, ranks: int) -> list[int]:
    """Returns the number of copies of each expert: repeatedly one more for the expert with most tokens per place.

    Args:
        loads: Tokens of each expert.
        places: Places of all ranks together, at least the number of experts.
        ranks: Number of ranks, the upper limit of copies of an expert.

    Raises:
        ValueError: If there are too few or too many places.
    """
    if not len(loads) <= places <= len(loads) * ranks:
        raise ValueError(
            f"`places` must be between the number of experts, {len(loads)}, and {ranks} times it. Got {places}."
        )
    counts = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(places - len(loads)):
        _, expert = heapq.heappop(heap)
        counts[expert] += 1
        if counts[expert] < ranks:
            heapq.heappush(heap, (-loads[expert] / counts[expert], expert))
    return counts


def place_experts(loads: Sequence[float], ranks: int, spare: int = 0) -> list[list[int]]:
    """Places experts on ranks so that the largest load of a rank is small.

    Greedy packing, the largest first, on the rank with the smallest load that has a free place and not this expert;
    then swaps of two experts between the most loaded rank and another, as long as a swap lowers the larger load.

    Args:
        loads: Tokens of each expert.
        ranks: Number of ranks of the `ep` axis.
        spare: Places in addition to one per expert, of all ranks together.

    Returns:
        By rank, its experts, ascending; no rank has one twice. Deterministic for given loads.

    Raises:
        ValueError: If the ranks cannot have equal numbers of places.
    """
    places = len(loads) + spare
    if places % ranks:
        raise ValueError(f"{len(loads)} experts and {spare} spare places cannot be divided equally by {ranks} ranks.")
    counts = replica_counts(loads, places, ranks)
    size, total = places // ranks, [0.0] * ranks
    each = [load / count for load, count in zip(loads, counts, strict=True)]
    found: list[set[int]] = [set() for _ in range(ranks)]
    open_ = [(0.0, r) for r in range(ranks)]  # ranks with a place left, the lightest first
    # of equal loads those with most copies first, while every rank has a free place
    for expert in sorted(range(len(loads)), key=lambda e: (-each[e], -counts[e], e)):
        taken: list[int] = []
        while len(taken) < counts[expert] and open_:
            taken.append(heapq.heappop(open_)[1])
        for rank in taken:
            found[rank].add(expert)
            total[rank] += each[expert]
        for _ in range(counts[expert] - len(taken)):
            rank = _make_room(found, expert, size, each, total)
            found[rank].add(expert)
            total[rank] += each[expert]
        if len(taken) < counts[expert]:  # `_make_room` has moved other experts
            open_ = sorted((total[r], r) for r in range(ranks) if len(found[r]) < size)
        else:
            for rank in taken:
                if len(found[rank]) < size:
                    heapq.heappush(open_, (total[rank], rank))
    _exchange(found, each, total)
    return [sorted(experts) for experts in found]


def _make_room(found: list[set[int]], expert: int, size: int, each: Sequence[float], total: list[float]) -> int:
    """Frees a place on a rank without `expert`: moves one of its experts to a rank with `expert` and a free place."""
    (full_of_it,) = [r for r in range(len(found)) if len(found[r]) < size][:1]
    for rank in sorted((r for r in range(len(found)) if expert not in found[r]), key=lambda r: (total[r], r)):
        moved = min(found[rank] - found[full_of_it], key=lambda e: (each[e], e), default=None)
        if moved is not None:
            found[rank].remove(moved)
            found[full_of_it].add(moved)
            total[rank] -= each[moved]
            total[full_of_it] += each[moved]
            return rank
    raise ValueError("No rank without this expert can free a place for it.")


def _exchange(found: list[set[int]], each: Sequence[float], total: list[float], rounds: int = 200) -> None:
    enough = 1.002 * sum(total) / len(total)
    for _ in range(rounds):
        worst = max(range(len(found)), key=lambda r: (total[r], -r))
        if total[worst] <= enough:
            return
        swap = _best_swap(found, each, total, worst)
        if swap is None:
            return
        mine, other, theirs = swap
        found[worst].remove(mine)
        found[other].add(mine)
        total[worst] -= each[mine]
        total[other] += each[mine]
        found[other].remove(theirs)
        found[worst].add(theirs)
        total[other] -= each[theirs]
        total[worst] += each[theirs]


def _best_swap(
    found: list[set[int]], each: Sequence[float], total: list[float], worst: int
) -> tuple[int, int, int] | None:
    """Finds the swap with one of the least loaded ranks that lowers the larger of both loads most."""
    best, least = None, total[worst] * (1 - 1e-9)
    for other in sorted(range(len(found)), key=lambda r: (total[r], r))[:2]:
        if other == worst:
            continue
        for mine in sorted(found[worst] - found[other]):
            for theirs in sorted(found[other] - found[worst]):
                change = each[mine] - each[theirs]
                larger = max(total[worst] - change, total[other] + change)
                if change > 0 and larger < least:
                    best, least = (mine, other, theirs), larger
    return best


def kept_in_place(placement: Sequence[Sequence[int]], present: Sequence[Sequence[int]]) -> list[list[int]]:
    """Assigns groups of experts to the ranks that already hold most of each group, so that few experts move.

    Args:
        placement: Groups of experts, one per rank, in any order.
        present: By rank, the experts that it holds.
    """
    owner = {expert: rank for rank, own in enumerate(present) for expert in own}
    common = Counter((g, owner[expert]) for g, group in enumerate(placement) for expert in group)
    taken: dict[int, int] = {}
    left = dict.fromkeys(range(len(placement)))
    for (g, rank), _ in sorted(common.items(), key=lambda item: (-item[1], item[0])):
        if g in left and rank not in taken:
            taken[rank] = g
            del left[g]
    rest = iter(left)
    return [sorted(placement[taken[rank] if rank in taken else next(rest)]) for rank in range(len(present))]


def owners(hosts: Sequence[Sequence[int]], present: Sequence[Sequence[int]]) -> list[list[int]]:
    """Chooses the rank that holds the weights of each expert: the same number per rank, preferably computed there.

    An expert stays on its rank if that rank computes it and no other expert has to go there. A maximum matching by
    augmenting paths; unmatched experts go to any rank with a free place.

    Args:
        hosts: By rank, the experts that it computes; every expert on at least one rank.
        present: By rank, the experts that it holds now, the same number per rank.

    Returns:
        By rank, the experts that it will hold, ascending.
    """
    size, ranks = len(present[0]), range(len(present))
    computed = map(set, hosts)
    found = [[e for e in own if e in hosted] for own, hosted in zip(present, computed, strict=True)]
    of_expert: dict[int, list[int]] = {e: [] for own in present for e in own}
    for rank, hosted in enumerate(hosts):
        for expert in hosted:
            of_expert[expert].append(rank)

    def settle(expert: int, seen: set[int]) -> bool:
        """Assigns `expert` to one of its hosts, moving another expert of that host elsewhere if necessary."""
        for rank in of_expert[expert]:
            if len(found[rank]) < size:
                found[rank].append(expert)
                return True
        for rank in of_expert[expert]:
            if rank in seen:
                continue
            seen.add(rank)
            other = next((e for e in list(found[rank]) if settle(e, seen)), None)
            if other is not None:
                found[rank].remove(other)
                found[rank].append(expert)
                return True
        return False

    kept = {e for own in found for e in own}
    rest = sorted(of_expert.keys() - kept, key=lambda e: (len(of_expert[e]), e))
    for expert in [e for e in rest if not settle(e, set())]:
        found[min(ranks, key=lambda r: len(found[r]))].append(expert)
    return [sorted(own) for own in found]


def imbalance(loads: Sequence[float], placement: Sequence[Sequence[int]]) -> float:
    """Returns the largest load of a rank over the mean; copies of an expert share its tokens equally."""
    counts = [0] * len(loads)
    for experts in placement:
        for expert in experts:
            counts[expert] += 1
    total = [sum(loads[e] / counts[e] for e in experts) for experts in placement]
    mean = sum(total) / len(total)
    return max(total) / mean if mean else 1.0


def least_imbalance(loads: Sequence[float], ranks: int, spare: int = 0) -> float:
    """Returns a lower bound of `imbalance` over all placements: 1, or the largest load per place over the mean."""
    mean = sum(loads) / ranks
    if not mean:
        return 1.0
    counts = replica_counts(loads, len(loads) + spare, ranks)
    return max(1.0, max(load / count for load, count in zip(loads, counts, strict=True)) / mean)
