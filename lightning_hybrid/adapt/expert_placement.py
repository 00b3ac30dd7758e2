"""Which rank holds which experts, by the tokens that go to them.

Every rank of the `ep` axis has equally many places. An expert with many tokens may stand on several ranks, which share
them. The largest sum of a rank, over the mean, is what a step waits for.

Reference: DeepSeek-AI, "Expert Parallelism Load Balancer" (2025): replicate the expert with the largest load a place,
then pack greedily. Unlike it, no rank gets an expert twice.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence


def replica_counts(loads: Sequence[float], places: int, ranks: int) -> list[int]:
    """On how many ranks each expert stands: one more, again and again, for the one with most tokens a place.

    Args:
        loads: Tokens of each expert.
        places: Of all ranks together, at least as many as experts.
        ranks: More copies than ranks are of no use.

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
    """The experts of each rank.

    Greedy packing, the largest first, on the rank with the smallest load that has a place left and not this expert;
    then exchanges of two experts between the fullest rank and any other, as long as that makes the fuller one lighter.

    Args:
        loads: Tokens of each expert.
        ranks: Of the `ep` axis.
        spare: Places beside one for each expert, of all ranks together.

    Returns:
        By rank, its experts, ascending; no rank has one twice. The same for the same loads.

    Raises:
        ValueError: If the places are not equally many on all ranks.
    """
    places = len(loads) + spare
    if places % ranks:
        raise ValueError(f"{len(loads)} experts and {spare} spare places are not equally many on {ranks} ranks.")
    counts = replica_counts(loads, places, ranks)
    size, total = places // ranks, [0.0] * ranks
    each = [load / count for load, count in zip(loads, counts, strict=True)]
    found: list[set[int]] = [set() for _ in range(ranks)]
    open_ = [(0.0, r) for r in range(ranks)]  # ranks with a place left, the lightest first
    # of equal loads those with most copies first, as long as every rank has a place
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
        if len(taken) < counts[expert]:  # others have moved, too
            open_ = sorted((total[r], r) for r in range(ranks) if len(found[r]) < size)
        else:
            for rank in taken:
                if len(found[rank]) < size:
                    heapq.heappush(open_, (total[rank], rank))
    _exchange(found, each, total)
    return [sorted(experts) for experts in found]


def _make_room(found: list[set[int]], expert: int, size: int, each: Sequence[float], total: list[float]) -> int:
    """Moves an expert from a rank without this one to a rank with a place left, which has it already."""
    (full_of_it,) = [r for r in range(len(found)) if len(found[r]) < size][:1]
    for rank in sorted((r for r in range(len(found)) if expert not in found[r]), key=lambda r: (total[r], r)):
        moved = min(found[rank] - found[full_of_it], key=lambda e: (each[e], e), default=None)
        if moved is not None:
            found[rank].remove(moved)
            found[full_of_it].add(moved)
            total[rank] -= each[moved]
            total[full_of_it] += each[moved]
            return rank
    raise ValueError("There is no place for an expert without having it twice on a rank.")


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
    """The exchange with one of the lightest ranks that lowers the larger of both sums most."""
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
    """The same groups of experts, given to the ranks that have most of them already, so that few move.

    Args:
        placement: Groups of experts, one for each rank, whichever.
        present: By rank, the experts that it has.
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
    """Which rank has the weights of which expert: equally many each, as many as can be of experts that it computes.

    An expert stays where it is if that rank computes it and no other one has to go there. A maximum matching by
    augmenting paths; what cannot be matched goes to any rank with a place left.

    Args:
        hosts: By rank, the experts that it computes; every expert on some rank.
        present: By rank, the experts that it has now, equally many each.

    Returns:
        By rank, the experts that it has from now on, ascending.
    """
    size, ranks = len(present[0]), range(len(present))
    computed = map(set, hosts)
    found = [[e for e in own if e in hosted] for own, hosted in zip(present, computed, strict=True)]
    of_expert: dict[int, list[int]] = {e: [] for own in present for e in own}
    for rank, hosted in enumerate(hosts):
        for expert in hosted:
            of_expert[expert].append(rank)

    def settle(expert: int, seen: set[int]) -> bool:
        """Gives it to one of its hosts, from which another expert goes elsewhere if it has to."""
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
    """The largest load of a rank over the mean; copies of an expert share its tokens."""
    counts = [0] * len(loads)
    for experts in placement:
        for expert in experts:
            counts[expert] += 1
    total = [sum(loads[e] / counts[e] for e in experts) for experts in placement]
    mean = sum(total) / len(total)
    return max(total) / mean if mean else 1.0


def least_imbalance(loads: Sequence[float], ranks: int, spare: int = 0) -> float:
    """What no placement can be below: the mean, or the largest load that is left for one place."""
    mean = sum(loads) / ranks
    if not mean:
        return 1.0
    counts = replica_counts(loads, len(loads) + spare, ranks)
    return max(1.0, max(load / count for load, count in zip(loads, counts, strict=True)) / mean)
