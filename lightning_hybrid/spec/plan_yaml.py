"""Order and form of the entries of a plan's file, for people who read and edit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from lightning_hybrid.spec.codec import Shared


def arranged(plan: Mapping[str, Any], stages: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Returns a plan in the form of a file: stages by their units instead of calls and cuts; equal parts once.

    Args:
        plan: The plan as plain data.
        stages: The units of each pipeline stage.
    """
    data, model = dict(plan), dict(plan["model"])
    tensor, experts = data.pop("tensor_plan", None), data.pop("expert_plans", None)
    del data["model"]
    data["recompute"] = plan.get("recompute")
    data.pop("cuts", None)
    if model.pop("calls", None) is not None:
        data["stages"] = stages
    if experts is not None:
        data["expert_plans"] = _once(experts)
    if tensor is not None:
        data["tensor_plan"] = tensor | {"units": _once(tensor["units"])}
    return data | {"model": model}


def rearranged(data: Any) -> Any:
    """Returns the plan as plain data; the inverse of `arranged`."""
    if not isinstance(data, dict):
        raise ValueError(f"it must be a mapping. Got {str(data)[:100]!r}.")
    plan = dict(data)
    if isinstance(plan.get("gradient_sync"), str):
        plan["gradient_sync"] = {"kind": plan["gradient_sync"]}
    stages = plan.pop("stages", None)
    if stages is None:
        return plan
    if not isinstance(stages, list) or not all(isinstance(units, list) for units in stages):
        raise ValueError(f"`plan.stages` must be a list of units for each stage. Got {stages!r}.")
    if not isinstance(plan.get("model"), dict):
        raise ValueError("`plan` lacks `model`.")
    plan["cuts"] = list(accumulate(map(len, stages)))[:-1]
    plan["model"] = plan["model"] | {"calls": [unit for units in stages for unit in units]}
    return plan


def _once(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Makes equal plans, of the blocks of a stack, be written once."""
    seen: dict[str, Shared] = {}
    return {name: seen.setdefault(repr(plan), Shared(plan)) if plan else plan for name, plan in plans.items()}
