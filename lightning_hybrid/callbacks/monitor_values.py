"""Computes the values that `HybridMonitor` logs from the measurements of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from lightning_hybrid.adapt.expert_placement import imbalance
from lightning_hybrid.spec.plan import Plan

_RANKS_LISTED = 16
"""Number of ranks up to which the memory of each rank is a value of its own; empirical, for readable charts."""


@dataclass(frozen=True, kw_only=True)
class RankMeasurements:
    """Measurements of one rank since the last logged step; all fields are numbers, NaN where nothing is known."""

    seconds: float = math.nan
    """Of training: without validation."""
    steps: float = 0.0
    """Steps of the optimizer in `seconds`."""
    samples: float = 0.0
    """Samples of this rank's replica in `seconds`."""
    tokens: float = math.nan
    """Tokens of this rank's replica in `seconds`."""
    flops: float = math.nan
    """Floating point operations of this rank in `seconds`, without recomputation."""
    recomputed_flops: float = math.nan
    """Operations of activation checkpointing in `seconds`."""
    step_samples: float = 0.0
    """Samples of this rank's replica in the last step."""
    step_tokens: float = math.nan
    """Tokens of this rank's replica in the last step."""
    split_seconds: float = math.nan
    """Time of the steps that were split."""
    split_steps: float = 0.0
    """Number of steps that were split."""
    computation: float = math.nan
    """Seconds, see `StepSplit`."""
    communication: float = math.nan
    """Seconds, see `StepSplit`."""
    bubble: float = math.nan
    """Seconds, see `StepSplit`."""
    data_wait: float = math.nan
    """Seconds in which the loop waited for the loader."""
    peak_bytes: float = math.nan
    """Peak memory: allocated on an accelerator, otherwise resident."""
    gradient_norm: float = math.nan
    """Norm of all gradients before clipping, equal on all ranks."""

    def row(self) -> tuple[float, ...]:
        """Returns the fields in order."""
        return astuple(self)


FIELDS = len(fields(RankMeasurements))
"""Number of fields, which come first in the row of a rank; the seconds of all stages follow."""


NORM = [f.name for f in fields(RankMeasurements)].index("gradient_norm")
"""Index of the norm, which is known on the device."""


def values_of(rows: Sequence[Sequence[float]], plan: Plan, peak_flops: float | None) -> dict[str, float]:
    """Returns the values to log, by key, without those that are not known.

    Args:
        rows: Of each rank its `RankMeasurements.row()`, followed by the seconds of each stage, 0 for those of others.
        plan: The plan in force.
        peak_flops: Highest number of operations per second of a device; None: unknown.
    """
    names = [f.name for f in fields(RankMeasurements)]
    ranks = [RankMeasurements(**dict(zip(names, row[:FIELDS], strict=True))) for row in rows]
    layout, count = plan.layout, len(rows)
    per_replica = layout.replicas / count  # all ranks of a replica count the same samples
    seconds, steps = max(r.seconds for r in ranks), ranks[0].steps
    found: dict[str, float] = {}
    if steps:
        found["throughput/samples_per_second"] = sum(r.samples for r in ranks) * per_replica / seconds
        found["throughput/tokens_per_second"] = sum(r.tokens for r in ranks) * per_replica / seconds
        for unit in ("samples", "tokens"):
            found[f"throughput/{unit}_per_second_per_device"] = found[f"throughput/{unit}_per_second"] / count
        found["throughput/steps_per_second"] = steps / seconds
        flops = sum(r.flops for r in ranks) / count / seconds
        found["throughput/tflops_per_device"] = flops / 1e12
        recomputed = sum(r.recomputed_flops for r in ranks) / count / seconds
        if recomputed > 0:
            found["throughput/hardware_tflops_per_device"] = (flops + recomputed) / 1e12
        if peak_flops is not None:
            found["throughput/mfu"] = flops / peak_flops
    found |= _split(ranks)
    if layout.pp > 1:
        found |= _stages([sum(row[FIELDS + s] for row in rows) for s in range(len(plan.stages))], ranks, plan)
    found["batch/global_samples"] = sum(r.step_samples for r in ranks) * per_replica
    found["batch/global_tokens"] = sum(r.step_tokens for r in ranks) * per_replica
    found["gradient_norm"] = ranks[0].gradient_norm
    peaks = [r.peak_bytes for r in ranks]
    found["memory/peak_mib"] = max(peaks) / 2**20
    if 1 < count <= _RANKS_LISTED:
        found |= {f"memory/peak_mib_rank{rank}": peak / 2**20 for rank, peak in enumerate(peaks)}
    found |= {f"layout/{axis}": float(getattr(layout, axis)) for axis in ("pp", "dp", "fsdp", "ep", "tp")}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _split(ranks: Sequence[RankMeasurements]) -> dict[str, float]:
    """Returns seconds per step, as means over the ranks; all parts add up to `time/step`."""
    steps = ranks[0].split_steps
    if not steps:
        return {}

    def mean(name: str) -> float:
        return sum(getattr(r, name) for r in ranks) / len(ranks) / steps

    found = {
        "time/step": mean("split_seconds"),
        "time/computation": mean("computation"),
        "time/communication": mean("communication"),
        "time/bubble": mean("bubble"),
        "time/data_wait": mean("data_wait"),
    }
    found["time/other"] = found["time/step"] - sum(list(found.values())[1:])
    found["time/computation_slowest_rank"] = max(r.computation for r in ranks) / steps
    return found


def _stages(seconds: Sequence[float], ranks: Sequence[RankMeasurements], plan: Plan) -> dict[str, float]:
    """Returns what the plan has predicted of the pipeline, beside what was measured."""
    total, whole = sum(seconds), sum(r.split_seconds for r in ranks)
    if not total or not ranks[0].split_steps:
        return {"bubble/predicted": plan.bubble}
    found = {"bubble/predicted": plan.bubble, "bubble/measured": sum(r.bubble for r in ranks) / whole}
    for stage, share in zip(plan.stages, stage_shares(seconds), strict=True):
        found[f"stages/share_{stage.index}"] = share
        found[f"stages/share_{stage.index}_predicted"] = stage.flop_share
    return found


def stage_shares(seconds: Sequence[float]) -> list[float]:
    """Returns the share of each stage in the computation of all stages."""
    total = sum(seconds)
    return [s / total for s in seconds]


def expert_values(loads: Mapping[str, Sequence[int]], plan: Plan) -> dict[str, float]:
    """Returns how uneven the tokens of experts are: 1 if all experts, or all ranks of `ep`, have equally many.

    Args:
        loads: Tokens of each expert, by module.
        plan: The plan in force.
    """
    ratios, of_ranks, ranks = [], [], plan.layout.ep
    for name, counts in loads.items():
        if total := sum(counts):
            ratios.append(max(counts) * len(counts) / total)
            expert_plan = plan.expert_plans[name]
            of_ranks.append(imbalance(counts, [expert_plan.computed(rank, ranks) for rank in range(ranks)]))
    if not ratios:
        return {}
    return {
        "experts/max_over_mean": sum(ratios) / len(ratios),
        "experts/max_over_mean_worst": max(ratios),
        "experts/max_over_mean_of_ranks": max(of_ranks),
    }
