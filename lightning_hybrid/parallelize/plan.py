"""From a LightningModule and a first batch to a Partition that is ready to be applied."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import (
    DeepSpeedPrecision,
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)

from lightning_hybrid._lightning_private import detects_anomalies
from lightning_hybrid._torch_private import own_buffers
from lightning_hybrid.batches import batch_size, split_batch
from lightning_hybrid.experts.detect import candidates, plan_experts, recorded_calls
from lightning_hybrid.ghosts.parameters import Parameters
from lightning_hybrid.ghosts.trace import Trace, trace_step
from lightning_hybrid.ghosts.units import CallInterceptor, Units, find_units
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.logs import silent
from lightning_hybrid.parallelize.apply import Partition, StepModule
from lightning_hybrid.replicas.batch_norm import has_batch_norm
from lightning_hybrid.replicas.reducer import refusal_of_gradients
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.expert_plan import ExpertPlan
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.plan import Plan, StagePlan, plan_stages
from lightning_hybrid.spec.request import Request
from lightning_hybrid.spec.stages import choose_microbatches
from lightning_hybrid.tensor.heads import check_heads
from lightning_hybrid.tensor.infer import infer_tensor_plan


def make_partition(
    root: pl.LightningModule,
    request: Request,
    mesh: Mesh,
    device: torch.device,
    precision: Callable[[], AbstractContextManager],
    sample: Callable[[], tuple[str, tuple]],
) -> Partition:
    """Looks at the module, and if it is to be cut or divided runs it once on ghosts, and decides everything.

    Args:
        root: The LightningModule.
        request: The strategy's arguments.
        mesh: The device mesh.
        device: This rank's device.
        precision: Enters the precision of a step.
        sample: Gives the name of the step function to plan with and its arguments, the first batch leading.

    Raises:
        PartitionError: If the layout does not suit the module.
    """
    request.gradient_sync.check(request.layout)
    if request.gradient_sync.kind == "diloco" and not root.automatic_optimization:
        raise PartitionError(
            f"`gradient_sync='diloco'` counts the optimizer's steps, but {type(root).__name__} optimizes manually "
            "(`automatic_optimization = False`). Use 'exact'."
        )
    units = find_units(root)
    interceptor = CallInterceptor(root, units)
    parameters = Parameters(root)
    layout = request.layout
    interceptor.install()
    try:
        if layout.pp == layout.tp == layout.ep == 1:
            _check_experts(request, ())
            plan = _whole_plan(layout, parameters, units)
            partition = Partition(root, mesh, plan, None, interceptor, parameters, StepModule(root))
            partition.gradient_sync = request.gradient_sync
            return partition
        if layout.tp > 1:
            check_heads(root, layout, request.tensor_plan)
        name, args = sample()
        _check_pipeline(root, request, name)
        count = microbatches_for(root, request, args[0])
        _move_buffers(root, device)
        arguments = (split_batch(args[0], count)[0], *args[1:])
        watched = units.names if layout.tp > 1 else None
        fused = candidates(root) if layout.ep > 1 else {}
        with recorded_calls(root, fused) as expert_calls:
            step = getattr(root, name)
            trace = trace_step(root, interceptor, step, arguments, device=device, context=precision, use_of=watched)
        if layout.pp > 1:
            plan = _staged_plan(request, units, trace, parameters, count)
        else:
            plan = _whole_plan(layout, parameters, units)
        partition = Partition(root, mesh, plan, trace, interceptor, parameters, StepModule(root))
        partition.gradient_sync = request.gradient_sync
        with silent(root):
            if layout.ep > 1:
                plans = plan_experts(root, fused, expert_calls, layout)
                partition.expert_plans = {n: _placed(n, p, request) for n, p in plans.items()}
            _check_experts(request, partition.expert_plans)
            if layout.tp > 1:
                partition.tensor_plan = infer_tensor_plan(root, trace.calls, layout.tp, request.tensor_plan, trace.use)
        trace.release()
        return partition
    except BaseException:
        interceptor.remove()
        raise


def _check_experts(request: Request, known: Collection[str]) -> None:
    for argument, named in (("expert_orders", request.expert_orders), ("expert_hosts", request.expert_hosts)):
        unknown = sorted(set(named) - set(known))
        if unknown:
            raise PartitionError(
                f"`{argument}` must name modules of experts that `layout='{request.layout}'` divides: "
                f"{', '.join(sorted(known)) or 'there are none'}. Got {', '.join(unknown)}."
            )


def _placed(name: str, plan: ExpertPlan, request: Request) -> ExpertPlan:
    placed = replace(plan, order=request.expert_orders.get(name), hosts=request.expert_hosts.get(name))
    placed.check(name, request.layout.ep)
    return placed


def _move_buffers(root: pl.LightningModule, device: torch.device) -> None:
    for owner in root.modules():
        buffers = own_buffers(owner)
        for key, buffer in buffers.items():
            if buffer is not None and buffer.device != device:
                buffers[key] = buffer.to(device)


def _check_pipeline(root: pl.LightningModule, request: Request, name: str) -> None:
    if request.layout.pp > 1 and not root.automatic_optimization and name == "training_step":
        raise PartitionError(
            f"`layout='{request.layout}'` has `pp={request.layout.pp}`, but {type(root).__name__} optimizes manually "
            "(`automatic_optimization = False`): its `training_step` calls the optimizer itself, and a pipeline has "
            "to run forward and backward of several microbatches interleaved. Use a layout without `pp`, such as "
            f"'{request.layout.moved('pp', 'dp')}'."
        )


_PRECISIONS = (MixedPrecision, HalfPrecision, DoublePrecision)


def check_precision(precision: Precision) -> None:
    """Refuses plugins that replace layers, or belong to another strategy.

    Raises:
        PartitionError: If so.
    """
    known = isinstance(precision, _PRECISIONS) or type(precision).convert_module is Precision.convert_module
    if not known or isinstance(precision, FSDPPrecision | DeepSpeedPrecision):
        raise PartitionError(
            f"`precision={precision.precision!r}` ({type(precision).__name__}) replaces layers or belongs to another "
            "strategy, so the module cannot be partitioned as it is. Use one of '32-true', '16-mixed', "
            "'bf16-mixed', '16-true', 'bf16-true' and '64-true'."
        )


def check_trainer(layout: Layout, trainer: pl.Trainer) -> None:
    """Refuses options of the Trainer that the layout cannot follow.

    Raises:
        PartitionError: If there is one.
    """
    if layout.tp > 1 and detects_anomalies(trainer):
        raise PartitionError(
            f"`layout='{layout}'` has `tp={layout.tp}`, and torch cannot look for NaN in gradients that are divided, "
            "as `Trainer(detect_anomaly=True)` asks. Leave it out: `on_nonfinite='raise'`, the default, says which "
            f"gradient is not finite first. Or use a layout without `tp`, such as '{layout.moved('tp', 'dp')}'."
        )


def microbatches_for(root: pl.LightningModule, request: Request, batch: Any) -> int:
    """The number of microbatches for a first batch like `batch`.

    Raises:
        PartitionError: If a number was given that does not suit the batch or the model.
    """
    layout, asked = request.layout, request.microbatches
    if layout.pp == 1:
        return 1
    normalised = has_batch_norm(root) and root.training
    if asked == "auto":
        return 1 if normalised else choose_microbatches(batch_size(batch), asked, layout.pp, request.schedule)
    asked = int(asked)
    if asked == 1:
        return 1
    if normalised:
        raise PartitionError(
            f"`microbatches={asked}` cannot give the result of one process for a model with BatchNorm, whose "
            "statistics are those of the whole batch. Use `microbatches=1` or 'auto', or GroupNorm in the model."
        )
    size = batch_size(batch)
    if size < asked or size % asked:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        raise PartitionError(
            f"`microbatches={asked}` must divide the batch of each replica, which has {size} samples. "
            f"Use one of {divisors}, a larger batch, or 'auto'."
        )
    count = choose_microbatches(size, asked, layout.pp, request.schedule)
    if count != asked:
        raise PartitionError(
            f"`microbatches={asked}` with `schedule='{request.schedule}'` must be a multiple of its rounds of about "
            f"`pp={layout.pp}` microbatches. Use {count} or 'auto'."
        )
    return asked


def _whole_plan(layout: Layout, parameters: Parameters, units: Units) -> Plan:
    names = tuple(parameters.names)
    stage = StagePlan(
        index=0, rank=0, first=0, stop=len(units.names), units=units.names, parameters=names, flop_share=1.0
    )
    return Plan(layout=layout, schedule="1F1B", microbatches=1, stages=(stage,), holders={n: (0,) for n in names})


def _staged_plan(request: Request, units: Units, trace: Trace, parameters: Parameters, count: int) -> Plan:
    if trace.takes_gradients:
        raise PartitionError(refusal_of_gradients(request.layout))
    chosen = set(units.blocks)
    return plan_stages(
        layout=request.layout,
        schedule=request.schedule,
        microbatches=count,
        names=[call.name for call in trace.calls],
        parameters=parameters.names,
        uses={parameters.first_names[n]: intervals for n, intervals in trace.parameter_uses.items()},
        flops=trace.flops,
        refusals={c: cut.refusal for c, cut in trace.cuts.items()},
        blocks=sum(call.name in chosen for call in trace.calls),
        cuts=request.cuts,
    )
