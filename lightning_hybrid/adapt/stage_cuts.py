"""Cuts a model into pipeline stages by measured times, on ranks that may differ in speed.

With c_i the seconds of stage i for one microbatch, forward and backward, and m microbatches, a step of a schedule with
one stage per rank takes (`step_seconds`)

    T = sum_i c_i + (m - 1) max_i c_i

Reference: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (2021),
section 2.2.1 (fill and drain of the pipeline, and steady state), generalized to unequal stages. Repartitioning during
training: Wahib et al., "DynMo" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple


def step_seconds(stages: Sequence[float], microbatches: int) -> float:
    """Returns T for these stage times."""
    return sum(stages) + (microbatches - 1) * max(stages)


class _Way(NamedTuple):
    """Partial solution of the dynamic program: cost and cuts of the first stages."""

    total: float
    largest: float
    cuts: tuple[int, ...]


def best_cuts(
    costs: Sequence[float], speeds: Sequence[float], microbatches: int, places: Collection[int]
) -> tuple[int, ...] | None:
    """Finds the contiguous stages with the smallest T.

    A dynamic program over stages and positions that keeps the partial solutions on the Pareto front of total time and
    largest stage time.

    Args:
        costs: Cost of each link of the chain, in any unit.
        speeds: By stage, in order, the seconds that its rank takes for a unit of cost.
        microbatches: m, the number of microbatches.
        places: Positions 0 < k < len(costs) at which the chain may be cut (before link k).

    Returns:
        The `len(speeds) - 1` positions of the cuts, ascending; None if there are too few places.
    """
    points = [0, *sorted(p for p in set(places) if 0 < p < len(costs)), len(costs)]
    if len(points) <= len(speeds):
        return None
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    known = _quick_cuts(points, prefix, speeds)
    enough = step_seconds([c * s for c, s in zip(known, speeds, strict=True)], microbatches) if known else math.inf
    fastest = [min(speeds[stage:]) for stage in range(len(speeds))] + [0.0]
    ways: list[list[_Way]] = [[_Way(0.0, 0.0, ())], *([] for _ in points[1:])]
    for stage, speed in enumerate(speeds):
        left = len(speeds) - stage - 1
        following: list[list[_Way]] = [[] for _ in points]
        for end in range(stage + 1, len(points) - left):
            found: list[_Way] = []
            for begin in range(stage, end):
                seconds = (prefix[points[end]] - prefix[points[begin]]) * speed
                cuts = (points[end],) if left else ()
                found += [_Way(w.total + seconds, max(w.largest, seconds), w.cuts + cuts) for w in ways[begin]]
            rest = (prefix[-1] - prefix[points[end]]) * fastest[stage + 1]
            possible = [w for w in found if w.total + rest + (microbatches - 1) * w.largest <= enough * (1 + 1e-9)]
            following[end] = _undominated(possible)
        ways = following
    best = min(ways[-1], key=lambda w: w.total + (microbatches - 1) * w.largest)
    return best.cuts


def _quick_cuts(points: Sequence[int], prefix: Sequence[float], speeds: Sequence[float]) -> list[float] | None:
    """Returns stage costs with about the smallest maximum time, by bisection over the maximum."""
    low, high, best = 0.0, prefix[-1] * max(speeds), None
    for _ in range(40):
        limit, begin, found = (low + high) / 2, 0, []
        for stage, speed in enumerate(speeds):
            last = len(points) - (len(speeds) - stage)
            end = begin + 1
            while end < last and (prefix[points[end + 1]] - prefix[points[begin]]) * speed <= limit:
                end += 1
            end = last if stage == len(speeds) - 1 else min(end, last)
            found.append(prefix[points[end]] - prefix[points[begin]])
            begin = end
        if max(c * s for c, s in zip(found, speeds, strict=True)) <= limit:
            high, best = limit, found
        else:
            low = limit
    return best


def _undominated(ways: list[_Way]) -> list[_Way]:
    kept: list[_Way] = []
    for way in sorted(ways):
        if not kept or way.largest < kept[-1].largest:
            kept.append(way)
    return kept


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Measured time of a stage."""

    rank: int
    """The pipeline rank that ran it."""
    first: int
    """Index of its first link."""
    stop: int
    """Index after its last link."""
    seconds: float
    """Time of one microbatch, forward and backward."""


def fit_costs(
    prior: Sequence[float], times: Sequence[StageTime], ranks: int, rounds: int = 200
) -> tuple[list[float], list[float]]:
    """Fits the cost of each link and the speed of each rank to measured stage times.

    Alternating least squares of `log seconds = log speed[rank] + log sum of costs`. Speeds are fitted first: a slow
    stage is attributed to a slow rank unless the times of other cuts contradict; the residual goes to the links.

    Args:
        prior: Initial costs, such as FLOPs.
        times: Measurements of one or several cuts.
        ranks: Number of ranks.
        rounds: Number of alternations.

    Returns:
        Costs, with the sum of `prior`, and speeds, in seconds per unit of cost.
    """
    costs, speeds = list(prior), [0.0] * ranks

    def ratios(rank: int) -> list[float]:
        return [t.seconds / sum(costs[t.first : t.stop]) for t in times if t.rank == rank]

    for _ in range(rounds):
        known = [
            math.exp(sum(map(math.log, found)) / len(found)) if (found := ratios(r)) else 0.0 for r in range(ranks)
        ]
        usual = median(s for s in known if s) if any(known) else 1.0
        speeds = [s or usual for s in known]
        steps, weights = [0.0] * len(costs), [0.0] * len(costs)
        for time in times:
            of_stage = sum(costs[time.first : time.stop])
            error = math.log(time.seconds / (speeds[time.rank] * of_stage))
            for link in range(time.first, time.stop):
                share = costs[link] / of_stage  # the derivative of the logarithm of the stage's time
                steps[link] += share * error
                weights[link] += share
        costs = [c * math.exp(s / w) if w else c for c, s, w in zip(costs, steps, weights, strict=True)]
        scale = sum(prior) / sum(costs)
        costs = [c * scale for c in costs]
    return costs, speeds
