"""Finds where the stages of a plan begin in a step function, which may differ from the one used for planning."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hybrid.ghosts.record import Trace
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.plan import Plan, stage_of


def stage_bounds(plan: Plan, name: str, trace: Trace) -> list[int]:
    """Returns the call at which each stage begins in the trace of a step function, and the number of calls.

    Args:
        plan: The plan, made with one step function.
        name: The name of the step function.
        trace: The trace of the step function.

    Raises:
        PartitionError: If this step calls modules in another order than the step used for planning.
    """
    planned = {}
    for key, index in _occurrences(plan.model.calls).items():
        planned[key] = next(s.index for s in plan.stages if s.first <= index < s.stop)
    bounds, stage = [0], 0
    for key, index in _occurrences([call.name for call in trace.calls]).items():
        target = planned.get(key, stage)
        if target < stage:
            raise PartitionError(
                f"`{name}` calls `{key[0]}` after modules of later stages, unlike the step that the stages were "
                "planned with. Use a layout without `pp`, or the same order of modules in every step."
            )
        bounds += [index] * (target - stage)
        stage = target
    bounds += [len(trace.calls)] * (len(plan.stages) - stage)
    if stage < len(plan.stages) - 1 or len(set(bounds)) < len(bounds):
        raise PartitionError(
            f"`{name}` calls no module of stage {stage + 1}, so it cannot run through the pipeline. "
            "Use a layout without `pp`."
        )
    _check_cuts(plan, name, trace, bounds)
    return bounds


def _check_cuts(plan: Plan, name: str, trace: Trace, bounds: list[int]) -> None:
    for c in bounds[1:-1]:
        if trace.cuts[c].refusal is not None:
            raise PartitionError(
                f"`{name}` cannot be cut before `{trace.calls[c].name}`: {trace.cuts[c].refusal}. Use a layout "
                "without `pp`."
            )
    for parameter, intervals in trace.parameter_uses.items():
        for interval in intervals:
            stage = stage_of(interval, bounds)
            if stage not in plan.holders[parameter]:
                raise PartitionError(
                    f"`{name}` uses `{parameter}` on stage {stage}, which holds it on stage "
                    f"{plan.holders[parameter][0]} only. Use a layout without `pp`."
                )


def _occurrences(calls: Sequence[str]) -> dict[tuple[str, int], int]:
    """Maps (unit, number of its earlier calls) to the index of the call."""
    seen: dict[str, int] = {}
    result = {}
    for index, name in enumerate(calls):
        result[name, seen.get(name, 0)] = index
        seen[name] = seen.get(name, 0) + 1
    return result
