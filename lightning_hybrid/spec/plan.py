"""A Plan: a Layout with everything decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.stages import balance, bubble, stage_ranks, stages_per_rank


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One pipeline stage."""

    index: int
    rank: int
    """The pipeline rank that holds it."""
    first: int
    """Index of its first unit call in the training step's trace (0 for the first stage)."""
    stop: int
    """Index of the first unit call of the next stage; for the last stage the number of calls."""
    units: tuple[str, ...]
    parameters: tuple[str, ...]
    """Names of the parameters that it uses, shared ones by their first name."""
    flop_share: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rank holds what, and in which order the microbatches run."""

    layout: Layout
    schedule: str
    microbatches: int
    stages: tuple[StagePlan, ...]
    holders: Mapping[str, tuple[int, ...]]
    """Parameter name to the stages that hold it; more than one for weights shared across stages."""
    costs: tuple[float, ...] = ()
    """FLOPs of each call of the training step, with what follows it; for `pp`."""
    places: tuple[int, ...] = ()
    """Calls before which the model may be cut; for `pp`."""

    @property
    def cuts(self) -> tuple[int, ...]:
        """The first call of each stage but the first."""
        return tuple(stage.first for stage in self.stages[1:])

    @property
    def bubble(self) -> float:
        """Predicted share of a step in which a rank waits."""
        return bubble(self.schedule, self.layout.pp, self.microbatches)

    def ranks_of(self, parameter: str) -> tuple[int, ...]:
        """The pipeline ranks that hold `parameter`, ascending."""
        return tuple(sorted({self.stages[s].rank for s in self.holders[parameter]}))


def plan_stages(
    *,
    layout: Layout,
    schedule: str,
    microbatches: int,
    names: Sequence[str],
    parameters: Sequence[str],
    uses: Mapping[str, Sequence[int]],
    flops: Sequence[float],
    refusals: Mapping[int, str | None],
    blocks: int,
    cuts: Sequence[int] | None = None,
) -> Plan:
    """Decides the stages of a model from its trace.

    Args:
        layout: The layout; `layout.pp` ranks.
        schedule: Name of the pipeline schedule.
        microbatches: Microbatches a step.
        names: The unit of each call, in order.
        parameters: All parameter names, shared ones once.
        uses: Intervals in which each parameter is used (see `Trace`).
        flops: Cost of interval -1 and of each call's interval.
        refusals: For each call index, why the model cannot be cut there, or None.
        blocks: How many calls of blocks there are; 0 if the model has no repeated stack.
        cuts: The first call of each stage but the first; None: balanced by cost.

    Raises:
        PartitionError: If there are more stages than places to cut, or `cuts` are none of them.
    """
    count = layout.pp * stages_per_rank(schedule)
    _check_block_count(layout, schedule, count, blocks or len(names), "block" if blocks else "module")
    places = [c for c, refusal in refusals.items() if refusal is None]
    # interval -1 belongs to the first call; a thousandth of the mean keeps calls without FLOPs from costing nothing
    floor = sum(flops) / max(1, len(names)) * 1e-3 or 1.0
    costs = [flops[0] + flops[1] + floor, *(f + floor for f in flops[2:])]
    if cuts is None:
        cuts = balance(costs, count, places)
    elif len(cuts) != count - 1 or not set(cuts) <= set(places) or list(cuts) != sorted(set(cuts)):
        raise PartitionError(
            f"`cuts` must be {count - 1} ascending numbers of calls before which the model may be cut, {places}. Got "
            f"{tuple(cuts)}."
        )
    if cuts is None:
        _refuse(layout, schedule, count, len(places), refusals, names)
    bounds = [0, *cuts, len(names)]  # type: ignore[misc]
    stages, holders = [], {name: [] for name in parameters}
    ranks = stage_ranks(schedule, layout.pp)
    for s in range(count):
        first, stop = bounds[s], bounds[s + 1]
        used = [n for n in parameters if any(stage_of(k, bounds) == s for k in uses.get(n, ()))]
        if s == 0:
            used = [n for n in parameters if n in used or n not in uses]  # never used: kept by the first stage
        for name in used:
            holders[name].append(s)
        stages.append(
            StagePlan(
                index=s,
                rank=ranks[s],
                first=first,
                stop=stop,
                units=tuple(names[first:stop]),
                parameters=tuple(used),
                flop_share=sum(costs[first:stop]) / sum(costs),
            )
        )
    return Plan(
        layout=layout,
        schedule=schedule,
        microbatches=microbatches,
        stages=tuple(stages),
        holders={name: tuple(stages) for name, stages in holders.items()},
        costs=tuple(costs),
        places=tuple(places),
    )


def stage_of(interval: int, bounds: Sequence[int]) -> int:
    """The stage that an interval of a trace belongs to, where stage s begins at call `bounds[s]`."""
    return max(s for s in range(len(bounds) - 1) if bounds[s] <= max(0, interval))


def _check_block_count(layout: Layout, schedule: str, count: int, available: int, kind: str) -> None:
    if count <= available:
        return
    largest = available // stages_per_rank(schedule)
    advice = [f"a `pp` of at most {largest}"] if largest > 1 else []
    if stages_per_rank(schedule) > 1 and layout.pp <= available:
        advice.append("a schedule with one stage a rank such as '1F1B'")
    advice.append(_without_pipeline(layout))
    raise PartitionError(
        f"`layout='{layout}'` with `schedule='{schedule}'` needs {count} pipeline stages, but the model has only "
        f"{available} {kind}{'' if available == 1 else 's'}, and a stage needs at least one. "
        f"Use {', or '.join(advice)}."
    )


def _without_pipeline(layout: Layout) -> str:
    """Layouts for as many devices that do not cut the model."""
    return (
        f"a layout that does not cut the model, such as '{layout.moved('pp', 'dp')}' or '{layout.moved('pp', 'fsdp')}'"
    )


def _refuse(
    layout: Layout, schedule: str, count: int, places: int, refusals: Mapping[int, str | None], names: Sequence[str]
) -> None:
    reasons = [f"before `{names[c]}`: {why}" for c, why in refusals.items() if why is not None]
    possible = (places + 1) // stages_per_rank(schedule)
    smaller = f"a `pp` of at most {possible}, or " if possible > 1 else ""
    raise PartitionError(
        f"`layout='{layout}'` with `schedule='{schedule}'` needs {count - 1} places to cut the model into stages, but "
        f"there are {places}. {'; '.join(reasons[:3])}. Use {smaller}{_without_pipeline(layout)}."
    )
