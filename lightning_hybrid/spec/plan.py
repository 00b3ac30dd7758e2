"""Plans: a layout with every decision about the partition."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

from lightning_hybrid.spec import codec
from lightning_hybrid.spec.checks import check_choices
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.expert_plan import ExpertPlan, plan_of
from lightning_hybrid.spec.gradient_sync import GradientSync
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.model import ModelSpec
from lightning_hybrid.spec.plan_yaml import arranged, rearranged
from lightning_hybrid.spec.stages import balance, bubble, stage_ranks, stages_per_rank
from lightning_hybrid.spec.table import table_text
from lightning_hybrid.spec.tensor_plan import ShardedParameter, TensorPlan, one_of_many

Recompute = Literal["selective", "full"]

_HEADINGS = (
    ("stage", True),
    ("rank", True),
    ("modules", False),
    ("blocks", True),
    ("parameters", True),
    ("FLOPs", True),
)
_LEAST_SHARE = 0.01
"""A stage has at least this share of the work of a mean stage where that is possible; empirical."""
_HEADER = """\
# A plan of lightning_hybrid. `HybridStrategy(layout="this file")` runs this plan.
# Pipeline stages list their units in the order of the step: move the first or last unit of a stage to its neighbor.
"""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One pipeline stage."""

    index: int
    rank: int
    """The pipeline rank that holds the stage."""
    first: int
    """Index of the stage's first unit call in the training step's trace (0 for the first stage)."""
    stop: int
    """Index of the first unit call of the next stage; for the last stage the number of calls."""
    units: tuple[str, ...]
    parameters: tuple[str, ...]
    """Names of the parameters that the stage uses; shared parameters by their first name."""
    flop_share: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Assignment of the model to ranks, pipeline schedule, and synchronization of replicas.

    `str(plan)` is the table that is printed at the start of a run. `to_yaml` writes everything; `from_yaml` reads an
    equal plan.

    Raises:
        ValueError: If the fields do not fit together.
    """

    layout: Layout
    schedule: str = "1F1B"
    microbatches: int = 1
    gradient_sync: GradientSync = GradientSync()
    """Gradient synchronization between replicas."""
    recompute: Recompute | None = None
    """Activation checkpointing of blocks."""
    compile: bool = False
    """True if each block is compiled."""
    cuts: tuple[int, ...] = ()
    """The first call of each pipeline stage but the first."""
    expert_plans: Mapping[str, ExpertPlan] = field(default_factory=dict)
    """Plans of the modules of experts that `ep` divides, by name."""
    tensor_plan: TensorPlan | None = None
    """Plan of the weights that `tp` divides; None without `tp`."""
    model: ModelSpec
    """The planned model."""

    def __post_init__(self) -> None:
        check_choices(self.schedule, self.microbatches, self.recompute)
        self._check_cuts()
        size = 1 if self.tensor_plan is None else self.tensor_plan.size
        if size != self.layout.tp:
            raise PartitionError(f"`tensor_plan` is for tp={size}, and `layout='{self.layout}'` has {self.layout.tp}.")
        if bool(self.expert_plans) != (self.layout.ep > 1):
            raise PartitionError(
                f"`layout='{self.layout}'` has ep={self.layout.ep}, and `expert_plans` has {len(self.expert_plans)} "
                "modules of experts."
            )
        for name, plan in self.expert_plans.items():
            plan.check(name, self.layout.ep)

    # ---- derived values

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """The pipeline stages; one with all units without `pp`."""
        model, ranks = self.model, stage_ranks(self.schedule, self.layout.pp)
        calls = model.calls or tuple(model.units)
        bounds = [0, *self.cuts, len(calls)]
        used: list[list[str]] = [[] for _ in bounds[1:]]
        for name, parameter in model.parameters.items():
            # parameters that are never used belong to the first stage
            for stage in sorted({stage_of(call, bounds) for call in parameter.calls or (0,)}) if self.cuts else (0,):
                used[stage].append(name)
        total = sum(model.costs) or 1.0
        return tuple(
            StagePlan(
                index=s,
                rank=ranks[s],
                first=first,
                stop=stop,
                units=calls[first:stop],
                parameters=tuple(used[s]),
                flop_share=sum(model.costs[first:stop]) / total if model.costs else 1.0,
            )
            for s, (first, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
        )

    @cached_property
    def holders(self) -> dict[str, tuple[int, ...]]:
        """Indices of the stages that hold a parameter, by its name; several for weights shared across stages."""
        found: dict[str, tuple[int, ...]] = dict.fromkeys(self.model.parameters, ())
        for stage in self.stages:
            for name in stage.parameters:
                found[name] += (stage.index,)
        return found

    @property
    def bubble(self) -> float:
        """Predicted fraction of a step in which a rank waits."""
        return bubble(self.schedule, self.layout.pp, self.microbatches)

    def ranks_of(self, parameter: str) -> tuple[int, ...]:
        """Returns the pipeline ranks that hold `parameter`, ascending."""
        return tuple(sorted({self.stages[s].rank for s in self.holders[parameter]}))

    def sharded_over_tp(self, parameter: str) -> ShardedParameter | None:
        """Returns the sharding of `parameter` over `tp`; None if it is replicated."""
        return None if self.tensor_plan is None else self.tensor_plan.parameters.get(parameter)

    def expert_plan_of(self, parameter: str) -> ExpertPlan | None:
        """Returns the plan of the experts that `parameter` belongs to; None for parameters outside experts."""
        return plan_of(self.expert_plans, parameter)

    # ---- as a table and a record

    def __str__(self) -> str:
        title = f"{self.layout}: {self.schedule}, {self.microbatches} microbatches, predicted bubble {self.bubble:.0%}"
        rows = []
        blocks = set(self.model.blocks)
        for stage in self.stages:
            span = f"{stage.units[0]} .. {stage.units[-1]}" if len(stage.units) > 1 else "".join(stage.units)
            share = f"{stage.flop_share:.0%}" if stage.flop_share else "-"
            count = str(sum(u in blocks for u in stage.units))
            elements = f"{self._elements(stage):,}"
            rows.append((str(stage.index), str(stage.rank), span or "all", count, elements, share))
        rows += [("", "", what, "", "", how) for what, how in self._sharded()]
        return table_text(title if self.layout.pp > 1 else str(self.layout), _HEADINGS, rows)

    def record(self) -> dict[str, Any]:
        """Returns the plan in numbers, texts, lists and dictionaries, for the hyperparameters that loggers keep."""
        record: dict[str, Any] = {"layout": str(self.layout), "devices": self.layout.devices}
        if self.layout.pp > 1:
            record |= {"schedule": self.schedule, "microbatches": self.microbatches, "bubble": round(self.bubble, 4)}
            record["stages"] = [
                {
                    "rank": stage.rank,
                    "first_module": stage.units[0],
                    "last_module": stage.units[-1],
                    "parameters": self._elements(stage),
                    "flop_share": round(stage.flop_share, 4),
                }
                for stage in self.stages
            ]
        if sharded := self._sharded():
            record["sharded"] = [f"{what}: {how}" for what, how in sharded]
        return record

    def _elements(self, stage: StagePlan) -> int:
        return sum(self.model.parameters[name].elements for name in stage.parameters)

    def _sharded(self) -> list[tuple[str, str]]:
        """Returns the sharded modules and weights, each with how it is sharded."""
        rows, layout = [], self.layout
        if self.tensor_plan is not None:
            rows += self.tensor_plan.rows()
        if self.expert_plans:
            name, plan = next(iter(self.expert_plans.items()))
            here = plan.experts // layout.ep
            rows.append((f"{len(self.expert_plans)} x {one_of_many(name)}", f"ep: {here} of {plan.experts} experts"))
        if layout.fsdp > 1:
            scalars = sum(not parameter.shape for parameter in self.model.parameters.values())
            what = "all weights" if layout.shards == layout.fsdp else "all other weights"
            rows.append((f"{what}, {scalars} scalars whole" if scalars else what, f"1/{layout.shards} a rank"))
        return rows

    # ---- as YAML

    def to_text(self) -> str:
        """Returns the plan as YAML."""
        return _HEADER + codec.to_text(arranged(codec.encode(self), [list(stage.units) for stage in self.stages]))

    @classmethod
    def from_text(cls, text: str) -> Plan:
        """Returns the plan of a text that `to_text` has returned.

        Raises:
            ValueError: If the text is not a plan.
        """
        return codec.decode(cls, rearranged(codec.from_text(text)), "plan")

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as YAML into a file, atomically."""
        target = Path(path)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        unfinished.write_text(self.to_text(), encoding="utf-8")
        os.replace(unfinished, target)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Plan:
        """Returns the plan of a file that `to_yaml` has written, and that may have been edited.

        Raises:
            ValueError: If there is no such file, or no valid plan in the file; names the file and the entry.
        """
        try:
            return cls.from_text(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"`{path}` cannot be read as a plan: {error}") from None

    # ---- checks

    def _check_cuts(self) -> None:
        calls, places = self.model.calls, self.model.places
        count = self.layout.pp * stages_per_rank(self.schedule) - 1 if self.layout.pp > 1 else 0
        if len(self.cuts) == count and set(self.cuts) <= set(places) and list(self.cuts) == sorted(set(self.cuts)):
            return
        raise PartitionError(
            f"`cuts` must be {count} ascending numbers of calls before which the model may be cut, {list(places)}. Got "
            f"{self.cuts}, before {', '.join(calls[c] for c in self.cuts if c < len(calls)) or 'nothing'}."
        )


def call_costs(flops: Sequence[float]) -> tuple[float, ...]:
    """Returns the cost of each call, including the operations after it.

    Args:
        flops: Cost of interval -1 and of each call's interval (see `Trace`).
    """
    # interval -1 belongs to the first call; a thousandth of the mean keeps calls without FLOPs from costing nothing
    floor = sum(flops) / max(1, len(flops) - 1) * 1e-3 or 1.0
    return (flops[0] + flops[1] + floor, *(f + floor for f in flops[2:]))


def choose_cuts(layout: Layout, schedule: str, model: ModelSpec, refusals: Mapping[int, str | None]) -> tuple[int, ...]:
    """Returns the first call of each stage but the first, which minimizes the maximum cost of a stage.

    Args:
        layout: The layout, with `layout.pp` pipeline ranks.
        schedule: Name of the pipeline schedule.
        model: The model, with the calls of a step.
        refusals: For each call index, the reason why the model cannot be cut there, or None.

    Raises:
        PartitionError: If there are more stages than places to cut.
    """
    count = layout.pp * stages_per_rank(schedule)
    of_blocks = [cost for call, cost in zip(model.calls, model.costs, strict=True) if call in set(model.blocks)]
    # a stack that does little of the work, such as heads of several tasks, does not limit the number of stages
    blocks = len(of_blocks) if sum(of_blocks) >= sum(model.costs) / 2 else 0
    _check_block_count(layout, schedule, count, blocks or len(model.calls), "block" if blocks else "module")
    least = _LEAST_SHARE * sum(model.costs) / count
    cuts = balance(model.costs, count, model.places, least) or balance(model.costs, count, model.places)
    if cuts is None:
        _refuse(layout, schedule, count, len(model.places), refusals, model.calls)
    return cuts


def stage_of(interval: int, bounds: Sequence[int]) -> int:
    """Returns the stage of an interval of a trace, where stage s begins at call `bounds[s]`."""
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
    """Returns advice: layouts for the same devices that do not cut the model."""
    return (
        f"a layout that does not cut the model, such as '{layout.moved('pp', 'dp')}' or '{layout.moved('pp', 'fsdp')}'"
    )


def _refuse(
    layout: Layout, schedule: str, count: int, places: int, refusals: Mapping[int, str | None], names: Sequence[str]
) -> NoReturn:
    reasons = [f"before `{names[c]}`: {why}" for c, why in refusals.items() if why is not None]
    possible = (places + 1) // stages_per_rank(schedule)
    smaller = f"a `pp` of at most {possible}, or " if possible > 1 else ""
    raise PartitionError(
        f"`layout='{layout}'` with `schedule='{schedule}'` needs {count - 1} places to cut the model into stages, but "
        f"there are {places}. {'; '.join(reasons[:3])}. Use {smaller}{_without_pipeline(layout)}."
    )
