"""Cuts a model into pipeline stages, and assigns stages to ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")
"""Names as in `torch.distributed.pipelining.schedules.get_schedule_class`."""
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
"""Schedules whose first and last stage share a rank."""


def stages_per_rank(schedule: str) -> int:
    """Returns the number of stages per rank: two for interleaved and V-shaped schedules, otherwise one."""
    return 1 if schedule in ("GPipe", "1F1B") else 2


def stage_ranks(schedule: str, ranks: int) -> tuple[int, ...]:
    """Returns the pipeline rank of each stage, in stage order."""
    count = ranks * stages_per_rank(schedule)
    if schedule in V_SHAPED:
        return tuple(s if s < ranks else count - 1 - s for s in range(count))
    return tuple(s % ranks for s in range(count))


def balance(costs: Sequence[float], stages: int, cuts: Collection[int], least: float = 0.0) -> tuple[int, ...] | None:
    """Cuts a chain into contiguous stages with the smallest possible maximum cost.

    Dynamic program over `best[s][k] = min over j < k of max(best[s - 1][j], sum(costs[j:k]))`. Among equal maxima the
    one with the smaller sum of squares wins, so that the lighter stages are balanced too.

    Args:
        costs: Cost of each link of the chain, such as FLOPs.
        stages: Number of stages.
        cuts: Positions 0 < k < len(costs) at which the chain may be cut (before link k).
        least: Smallest cost of a stage.

    Returns:
        The chosen positions, ascending, `stages - 1` of them; None if there are too few.
    """
    allowed = [k for k in sorted(set(cuts)) if 0 < k < len(costs)]
    if len(allowed) < stages - 1:
        return None
    points = [0, *allowed, len(costs)]
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)

    def span(j: int, k: int) -> float:
        cost = prefix[points[k]] - prefix[points[j]]
        return cost if cost >= least else float("inf")

    infinite = (float("inf"), float("inf"))
    best = [(span(0, k), span(0, k) ** 2) if k else infinite for k in range(len(points))]
    choices: list[list[int]] = []
    for _ in range(stages - 1):
        following, choice = [infinite] * len(points), [0] * len(points)
        for k in range(1, len(points)):
            for j in range(1, k):
                cost = span(j, k)
                candidate = (max(best[j][0], cost), best[j][1] + cost**2)
                if candidate < following[k]:
                    following[k], choice[k] = candidate, j
        best = following
        choices.append(choice)
    if best[-1][0] == float("inf"):
        return None
    result, k = [], len(points) - 1
    for choice in reversed(choices):
        k = choice[k]
        result.append(points[k])
    return tuple(reversed(result))


def bubble(schedule: str, ranks: int, microbatches: int) -> float:
    """Returns the predicted fraction of a step in which a rank waits, with backward = 2 x forward and equal stages.

    Reference: the bubble of GPipe and 1F1B is (p - 1)/(m + p - 1) (Narayanan et al., 2021, section 2.2.1); interleaving
    v stages divides it by v (section 2.2.2). ZB-V and DualPipeV (Qi et al., 2024, section 4) count like two interleaved
    stages, since weight gradients are computed together with those of the inputs.
    """
    if ranks == 1:
        return 0.0
    idle = (ranks - 1) / stages_per_rank(schedule)
    return idle / (microbatches + idle)


def choose_microbatches(batch: int, requested: int | str, ranks: int, schedule: str) -> int:
    """Returns the number of microbatches of a batch of `batch` samples.

    `"auto"` is the largest divisor of the batch up to four per pipeline rank: a bubble of at most a fifth. A given
    number is used if it divides the batch; the last, smaller batch of an epoch uses the largest divisor below it.
    """
    limit = 4 * ranks if requested == "auto" else int(requested)
    return max(d for d in range(1, min(limit, batch) + 1) if batch % d == 0 and divides_into(schedule, ranks, d))


def divides_into(schedule: str, ranks: int, microbatches: int) -> bool:
    """Returns True if a schedule can run this number of microbatches.

    Interleaved1F1B runs rounds of about `ranks` microbatches, all of equal size.
    """
    return schedule != "Interleaved1F1B" or microbatches % max(1, microbatches // ranks) == 0


def runnable_schedule(schedule: str, ranks: int, microbatches: int) -> str:
    """Returns the schedule to run with this number of microbatches, on the same stages.

    With fewer microbatches than stages 1F1B never reaches its steady state and is GPipe, and DualPipeV has nothing to
    overlap; torch refuses both, so GPipe and ZBVZeroBubble run such (usually the last, smaller) batches.
    """
    if schedule == "1F1B" and microbatches < ranks:
        return "GPipe"
    if schedule == "DualPipeV" and microbatches < 2 * ranks:
        return "ZBVZeroBubble"
    return schedule
