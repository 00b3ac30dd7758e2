"""Plans the partition of a LightningModule from a first batch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
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

from lightning_hybrid._lightning_private import detects_anomalies, takes_iterator, twins
from lightning_hybrid._torch_private import location_of, own_buffers
from lightning_hybrid.batches import copied_batch, find_samples, split_batch
from lightning_hybrid.dataloader.peek import Share
from lightning_hybrid.experts.detect import candidates, plan_experts, recorded_calls
from lightning_hybrid.ghosts.begun import as_at_first_batch
from lightning_hybrid.ghosts.contract import StepContract
from lightning_hybrid.ghosts.dry_run import failure_of_step, trace_step
from lightning_hybrid.ghosts.parameters import Parameters
from lightning_hybrid.ghosts.record import Trace
from lightning_hybrid.ghosts.units import CallInterceptor, find_units
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.logs import silent
from lightning_hybrid.parallelize.apply import Partition, StepModule
from lightning_hybrid.parallelize.backward_hooks import check_backward_hooks
from lightning_hybrid.parallelize.describe import describe, divided_attributes, with_calls
from lightning_hybrid.parallelize.observe import observe_calls
from lightning_hybrid.parallelize.whole_batch import microbatches_for, whole_batch_reason
from lightning_hybrid.patching import Patches
from lightning_hybrid.replicas.batch_norm import plain_sync_batch_norms
from lightning_hybrid.replicas.reducer import refusal_of_gradients
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.expert_plan import ExpertPlan
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.model import ModelSpec
from lightning_hybrid.spec.plan import Plan, choose_cuts
from lightning_hybrid.spec.request import Request
from lightning_hybrid.tensor.heads import check_heads
from lightning_hybrid.tensor.infer import infer_tensor_plan


def make_partition(
    root: pl.LightningModule,
    request: Request,
    mesh: Mesh,
    device: torch.device,
    precision: Callable[[], AbstractContextManager],
    sample: Callable[[Share | None], tuple[str, tuple, int | None]],
) -> Partition:
    """Plans the partition, which is returned ready to be applied; unless `dp` is the only axis, runs a step on ghosts.

    Args:
        root: The LightningModule.
        request: The layout and its options.
        mesh: The device mesh.
        device: This rank's device.
        precision: Returns a context with the precision of a step.
        sample: Returns the name of the step function to plan with, the step's arguments, the first batch first, of a
            replica or with None of one process, and the number of samples that were read for it if it is known.

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
    interceptor.install()
    sync_norms = Patches()
    try:
        sync_norms = plain_sync_batch_norms(root)
        sync_norms.apply()
        model = describe(root, units, parameters)
        if request.plan is not None:
            _check_model(root, request.plan, model)
        check_backward_hooks(root, request.layout, units.names)
        run = _DryRun(root, request, device, precision, sample, interceptor)
        plan = (
            _decide(run, model, parameters) if request.plan is None else _follow(run, request.plan, model, parameters)
        )
        whole_batch = whole_batch_reason(root, run.contract if run.step == "training_step" else StepContract())
        partition = Partition(
            root, mesh, plan, interceptor, parameters, StepModule(root), whole_batch, sync_norms=sync_norms
        )
        if plan.layout.fsdp > 1:
            share = Share(mesh.replica, plan.layout.replicas)
            partition.calls = observe_calls(partial(run.trace_own, share), parameters, units.names)
        return partition
    except BaseException:
        sync_norms.restore()
        interceptor.remove()
        raise


@dataclass
class _DryRun:
    """Runs the module's first step on ghosts."""

    root: pl.LightningModule
    request: Request
    device: torch.device
    precision: Callable[[], AbstractContextManager]
    sample: Callable[[Share | None], tuple[str, tuple, int | None]]
    interceptor: CallInterceptor
    step: str = ""
    microbatches: int = 1
    samples: int | None = None
    contract: StepContract = StepContract()

    def prepare(self) -> tuple:
        """Returns the arguments of the step, the first batch first."""
        self.step, args, self.samples = self.sample(None)
        _check_pipeline(self.root, self.request, self.step)
        self.microbatches = microbatches_for(self.root, self.request, args[0], self.samples)
        return args

    def trace(self, args: tuple, watched: Collection[str] | None = None) -> Trace:
        """Runs the step on the first microbatch, or on the whole batch if parts of it do not run as it does.

        Raises:
            PartitionError: If the step cannot be planned, or the requested microbatches do not run as the batch does.
        """
        asked, failure = self.microbatches, None
        try:
            trace, indivisible = self._trace_parts(args, watched)
        except PartitionError as error:
            failure, indivisible = error, failure_of_step(error)
            if asked == 1 or indivisible is None:
                raise
        if indivisible is not None:
            self.microbatches = 1
            trace, _ = self._trace_parts(args, watched)
            if failure is not None:
                indivisible = f"on a part of the batch the step fails at {indivisible}, and on the whole batch it runs"
        self.contract = replace(trace.contract, indivisible=indivisible)
        self.microbatches = asked
        if self.step == "training_step":
            self.microbatches = microbatches_for(self.root, self.request, args[0], self.samples, self.contract)
        return trace

    def _trace_parts(self, args: tuple, watched: Collection[str] | None) -> tuple[Trace, str | None]:
        """Runs the step on the first microbatch; also returns why others do not run like it, or None."""
        parts = split_batch(args[0], self.microbatches, self.samples)
        trace = self._trace_part(parts[0], args, watched)
        if self.request.layout.pp == 1:
            return trace, None
        if trace.takes_gradients:
            raise PartitionError(refusal_of_gradients(self.request.layout))
        return trace, self._compare_parts(trace, parts, args) if trace.depends_on_values else None

    def _trace_part(self, batch: Any, args: tuple, watched: Collection[str] | None = None) -> Trace:
        return self._traced(getattr(self.root, self.step), self.step, (batch, *args[1:]), watched)

    def _compare_parts(self, trace: Trace, parts: list[Any], args: tuple) -> str | None:
        """Refuses the cuts of `trace` where shapes differ between parts of the batch, since its values decide them.

        Returns:
            Why microbatches call different modules, if they do, otherwise None.
        """
        first = trace
        if len(parts) == 1:
            if (find_samples(args[0], self.samples).count or 0) < 2:
                return None  # it has no samples that could be compared
            parts = split_batch(args[0], 2, self.samples)
            try:
                first = self._trace_part(parts[0], args)
            except PartitionError:
                return None  # only the whole batch runs
        other = self._trace_part(parts[-1], args)
        if self.microbatches > 1 and (different := first.different_call(other)) is not None:
            index, one, another = (f"`{name}`" if isinstance(name, str) and name else name for name in different)
            return (
                f"{location_of(getattr(self.root, self.step))} calls modules by values of the batch: call {index} is "
                f"{one or 'none'} in one part of it and {another or 'none'} in another"
            )
        trace.refuse_different_cuts(first, other)
        return None

    def trace_own(self, share: Share, changed: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Trace:
        """Runs the step on a batch of the replica `share`.

        Args:
            share: The replica.
            changed: Returns a replacement of the step function.
        """
        name, args, _ = self.sample(share)
        step = changed(getattr(self.root, name))
        return self._traced(step, name, args, self.interceptor.units.names)

    def _traced(
        self, step: Callable[..., Any], name: str, args: tuple, watched: Collection[str] | None = None
    ) -> Trace:
        _move_buffers(self.root, self.device)
        given = copied_batch(args)  # a step may change its batch
        if takes_iterator(getattr(self.root, name)):
            given = (repeat((given[0], 0, 0)), *given[1:])
        return trace_step(
            self.root,
            self.interceptor,
            step,
            given,
            device=self.device,
            context=self.precision,
            use_of=watched,
            ready=lambda: as_at_first_batch(self.root, name, args[0]),
            learn_state=self.request.layout.pp > 1,
            gradients=name == "training_step",
        )


def _decide(run: _DryRun, model: ModelSpec, parameters: Parameters) -> Plan:
    """Returns a plan with every decision that the request leaves open."""
    root, request, layout = run.root, run.request, run.request.layout
    base = Plan(
        layout=Layout(),
        gradient_sync=request.gradient_sync,
        recompute=request.recompute,
        compile=request.compile,
        model=model,
    )
    if layout.pp == layout.tp == layout.ep == 1:
        _check_experts(request, ())
        return replace(base, layout=layout)
    if layout.tp > 1:
        check_heads(root, layout, request.tensor_plan)
    args = run.prepare()
    fused = candidates(root) if layout.ep > 1 else {}
    with recorded_calls(root, fused) as expert_calls:
        trace = run.trace(args, model.units if layout.tp > 1 else None)
    cuts, schedule = (), "1F1B"
    if layout.pp > 1:
        model, schedule = with_calls(model, run.step, trace, parameters), request.schedule
        refusals = {c: cut.refusal for c, cut in trace.cuts.items()}
        chosen = choose_cuts(layout, schedule, model, refusals)
        cuts = chosen if request.cuts is None else request.cuts
    tensor_plan, expert_plans = None, {}
    with silent(root):
        if layout.ep > 1:
            found = plan_experts(root, fused, expert_calls, layout)
            expert_plans = {n: _placed(n, p, request) for n, p in found.items()}
        _check_experts(request, expert_plans)
        if layout.tp > 1:
            tensor_plan = infer_tensor_plan(root, trace.calls, layout.tp, request.tensor_plan, trace.use)
    trace.release()
    return replace(
        base,
        layout=layout,
        schedule=schedule,
        microbatches=run.microbatches,
        cuts=cuts,
        tensor_plan=tensor_plan,
        expert_plans=expert_plans,
        model=replace(model, attributes=divided_attributes(root, tensor_plan, expert_plans)),
    )


def _follow(run: _DryRun, plan: Plan, model: ModelSpec, parameters: Parameters) -> Plan:
    """Returns `plan` unchanged; under `pp` traces the step on ghosts to compare its calls with those of the plan."""
    if plan.layout.pp > 1:
        args = run.prepare()
        if run.step == plan.model.step:
            trace = run.trace(args)
            _check_model(run.root, plan, with_calls(model, run.step, trace, parameters))
            trace.release()
    return plan


def _check_model(root: pl.LightningModule, plan: Plan, model: ModelSpec) -> None:
    model = replace(model, attributes=divided_attributes(root, plan.tensor_plan, plan.expert_plans))
    difference = plan.model.difference(model)
    if difference is not None:
        raise PartitionError(
            f"The plan that `layout` names was made for another model than this {type(root).__name__}. The first "
            f"difference is {difference}. Give `layout='{plan.layout}'` to plan this model; `strategy.plan.to_yaml` "
            "writes that plan."
        )


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
    if request.layout.pp > 1 and takes_iterator(getattr(root, name)):
        raise PartitionError(
            f"`layout='{request.layout}'` has `pp={request.layout.pp}`, but {location_of(getattr(root, name))} takes "
            "an iterator (`dataloader_iter`), so its batch cannot be split into microbatches. Give the step an "
            f"argument `batch`, or use a layout without `pp`, such as '{request.layout.moved('pp', 'dp')}'."
        )


_PRECISIONS = (MixedPrecision, HalfPrecision, DoublePrecision)


def check_precision(precision: Precision) -> None:
    """Refuses plugins that replace layers, or belong to another strategy.

    Raises:
        PartitionError: If `precision` is such a plugin.
    """
    plain = [kind.convert_module for kind in twins(Precision)]
    known = isinstance(precision, twins(*_PRECISIONS)) or type(precision).convert_module in plain
    if not known or isinstance(precision, twins(FSDPPrecision, DeepSpeedPrecision)):
        raise PartitionError(
            f"`precision={precision.precision!r}` ({type(precision).__name__}) replaces layers or belongs to another "
            "strategy, so the module cannot be partitioned as it is. Use one of '32-true', '16-mixed', "
            "'bf16-mixed', '16-true', 'bf16-true' and '64-true'."
        )


def check_trainer(layout: Layout, trainer: pl.Trainer) -> None:
    """Refuses options of the Trainer that the layout cannot follow.

    Raises:
        PartitionError: If `trainer` has such an option.
    """
    if layout.tp > 1 and detects_anomalies(trainer):
        raise PartitionError(
            f"`layout='{layout}'` has `tp={layout.tp}`, and torch cannot look for NaN in gradients that are divided, "
            "as `Trainer(detect_anomaly=True)` requires. Leave it out: `on_nonfinite='raise'`, the default, names the "
            f"first non-finite gradient. Or use a layout without `tp`, such as '{layout.moved('tp', 'dp')}'."
        )
