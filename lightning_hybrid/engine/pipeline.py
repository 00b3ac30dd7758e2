"""Runs a step through pipeline stages: by torch's schedules in training, in one pass in stage order in evaluation."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from lightning_hybrid._torch_private import checkpoints_not_reentrant, location_of
from lightning_hybrid.batches import copied_batch, count_samples, find_samples, signature, split_batch
from lightning_hybrid.collectives import share_object
from lightning_hybrid.dataloader.sharding import BatchWeights
from lightning_hybrid.engine.carried import CarriedState
from lightning_hybrid.engine.clocks import ClockSet
from lightning_hybrid.engine.context import StepContext
from lightning_hybrid.engine.loss_weights import loss_of, mean_loss, weight_of, weights_of_parts, with_weights
from lightning_hybrid.engine.stage import StageProgram, StageRun, StopStage
from lightning_hybrid.engine.stage_bounds import stage_bounds
from lightning_hybrid.ghosts.contract import StepContract
from lightning_hybrid.ghosts.dry_run import failure_of_step, trace_step
from lightning_hybrid.ghosts.ghost import Ghost, GhostReadError, GhostWriteError, parameter_slots
from lightning_hybrid.ghosts.record import CrossingValue, Trace
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.outputs import NOT_JOINED, NotJoinedError, extras, join
from lightning_hybrid.metrics.torchmetrics import Metrics
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.backward_hooks import check_backward_hooks
from lightning_hybrid.parallelize.whole_batch import refusal_of_microbatches, whole_batch_reason
from lightning_hybrid.patching import patched
from lightning_hybrid.rng.step import StepRNG
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.stages import choose_microbatches, runnable_schedule

_KEPT_SHAPES = 8
"""Number of batch shapes for which stage buffers are kept; the least recently used are dropped first."""

_ALIKE = 4
"""Number of equal traces for different constants in the batch, after which the constants decide nothing; empirical.
Deviations are refused where they happen."""


@dataclass
class _Prepared:
    """Stage programs and schedule for one shape of batch."""

    programs: dict[int, StageProgram]
    outline: Hashable
    """A key that is equal for equal traces."""
    contract: StepContract
    bounds: list[int]
    """The first call of each stage, and the number of calls."""
    schedule: Any = None
    whole_batch: str | None = None
    """Why batches must not be split into microbatches, for a training step; None if they may."""


class _StageModule(nn.Module):
    """Module that torch's `PipelineStage` calls: runs one stage on one microbatch."""

    def __init__(self, pipeline: Pipeline, stage: int, program: StageProgram) -> None:
        super().__init__()
        self._run, self._program, self._stage = pipeline.run_stage, program, stage
        self.microbatch = 0
        """Index of the next microbatch."""

    def forward(self, *received: Tensor) -> Any:
        out = self._run(self._stage, self._program, received if self._program.first else (), self.microbatch)
        return out if isinstance(out, Tensor) or len(out) > 1 else out[0]  # of another stage: a token at least


class _TimedStage(PipelineStage):
    """Pipeline stage whose passes are timed if the pipeline has clocks."""

    pipeline: Pipeline

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward pass of one microbatch."""
        self.submod.microbatch = fwd_chunk_id  # type: ignore[assignment]
        with self._timed():
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the backward pass of one microbatch."""
        with self._timed():
            super().backward_one_chunk(*args, **kwargs)
            self.pipeline.after_backward(self.stage_index)

    def _timed(self) -> AbstractContextManager:
        return self.pipeline.clocks.stage(self.stage_index)


class Pipeline:
    """Runs the pipeline stages of this rank.

    Args:
        root: The partitioned LightningModule.
        partition: The partition of `root`.
        mesh: The device mesh.
        device: This rank's device.
        precision: Returns a context with the precision of a step (autocast).
        metrics: The metrics of the module.
        rng: Sets the RNG state of each microbatch.
    """

    def __init__(
        self,
        root: pl.LightningModule,
        partition: Partition,
        mesh: Mesh,
        device: torch.device,
        precision: Callable[[], AbstractContextManager],
        metrics: Metrics,
        rng: StepRNG,
    ) -> None:
        self.root, self.partition, self.mesh, self.device, self.precision = root, partition, mesh, device, precision
        self._metrics, self._rng = metrics, rng
        self.local = [s.index for s in partition.plan.stages if s.rank == mesh.rank("pp")]
        self.has_last = len(partition.plan.stages) - 1 in self.local
        self.last_rank = partition.plan.stages[-1].rank
        self.prepared: OrderedDict[Any, _Prepared] = OrderedDict()
        """Stage programs and schedules, by step function and shapes of the batch."""
        self._alike: set[Hashable] = set()
        """Forms of batches whose constants do not change the trace."""
        ranks = [stage.rank for stage in partition.plan.stages]
        self._carried = CarriedState(root, mesh, device, ranks, partition.interceptor.units.names)
        self.whole_batch = partition.whole_batch
        """Why a batch must not be split into microbatches; None if it may be, as far as the steps so far show."""
        self._running: _Step | None = None
        self.separate_gradients: Callable[[], None] = lambda: None
        """Called after the first backward pass of each stage in a step."""
        self.clocks = ClockSet()
        """Clocks that time the stages."""

    @property
    def _step(self) -> _Step:
        if self._running is None:
            raise RuntimeError("No step has begun.")
        return self._running

    @property
    def parts(self) -> int:
        """Number of microbatches of the last step; 0 before the first step."""
        return 0 if self._running is None else len(self._running.arguments)

    # ---- training

    def train(
        self,
        context: StepContext,
        args: tuple,
        scale: float | Tensor,
        requested: int | str,
        known: int | None = None,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Runs `training_step` forward and backward; gradients are added to `.grad`.

        Args:
            context: The context of the step. With batch weights, the number of microbatches suits the batches of all
                replicas: replicas that share weights must run the same number.
            args: Arguments of `training_step`, the batch first.
            scale: Factor on the loss in the backward pass (1 / accumulated batches, and that of a loss scaler).
            requested: Number of microbatches, or `"auto"`.
            known: Number of samples that the loader has read; None: not known.

        Returns:
            On the rank with the last stage, the mean loss, and the values that `training_step` returned besides the
            loss; None and an empty dictionary on other ranks.
        """
        weights = context.weights
        if self.whole_batch is not None:
            requested = 1
        size, count = (1, 1) if requested == 1 else self._count_microbatches(args[0], requested, known, weights)
        parts = split_batch(args[0], count, known)
        prepared = self._prepare_parts((parts[0], *args[1:]), count, requested)
        if prepared is None:
            return self.train(context, args, scale, 1, known)
        self.whole_batch = self.whole_batch or prepared.whole_batch
        if count > 1 and self.whole_batch is not None:
            if requested != "auto":
                raise PartitionError(refusal_of_microbatches(requested, self.whole_batch))
            return self.train(context, args, scale, 1, known)
        self._carried.begin(prepared.contract, prepared.bounds, count)
        logged = count_samples(args[0]) / count  # Lightning's own count of samples, where they are not on dim 0
        self._running = _Step(context, [(p, *args[1:]) for p in parts], [logged] * count, scale / count)
        if weights is not None and weights.tokens is not None:
            self._running.weights = weights.tokens.weights(count)
        losses: list[Tensor] = []
        first = [torch.zeros(count)] if 0 in self.local else []
        try:
            prepared.schedule.step(
                *first,
                target=torch.zeros(count) if self.has_last else None,
                losses=losses if self.has_last else None,
                return_outputs=False,
            )
        except RuntimeError as error:  # torch wraps what a stage raises
            raise (error.__cause__ or error) from None
        if not self.has_last:
            return None, {}
        step = self._step
        returned = [step.extras[i] for i in range(count)] if any(step.extras.values()) else []
        try:
            joined = join(returned, [size // count] * count) if returned else {}
        except NotJoinedError as error:
            joined = {NOT_JOINED: str(error)}  # raised on all ranks, which wait for what this one shares
        if not step.loss_weights or NOT_JOINED in joined:
            return torch.stack(step.losses).mean(), joined
        own = weights_of_parts(self.root, step.loss_weights, count)
        return mean_loss(step.losses, own), with_weights(joined, own)

    def _count_microbatches(
        self, batch: Any, requested: int | str, known: int | None, weights: BatchWeights | None
    ) -> tuple[int, int]:
        """Returns the number of samples, and of microbatches: 1 if the batch of a replica that shares weights is whole.

        Collective over the replicas if they share weights, which run the same modules at the same time.
        """
        plan = self.partition.plan
        size = find_samples(batch, known).count or 1
        divided = size if weights is None else math.gcd(size, weights.common_divisor)
        count = choose_microbatches(divided, requested, plan.layout.pp, plan.schedule)
        if plan.layout.replicas > plan.layout.dp:
            fewest = torch.tensor(count, device=self.device)
            dist.all_reduce(fewest, dist.ReduceOp.MIN, group=self.mesh.replica_group)
            count = int(fewest)
        return size, count

    def run_stage(self, stage: int, program: StageProgram, inputs: tuple[Tensor, ...], index: int) -> Any:
        """Runs one stage on microbatch `index`; returns the tensors to send, or the result of the last stage."""
        step, name = self._step, self._step.context.name
        observer = self.partition.parameters.observer
        observer.allowed_writes = program.trace.ghost_writes
        run = StageRun(program, inputs, self.device, self._metrics, observer)
        run.whole_batch, run.has_weights = self.parts == 1, self._has_weights
        self._carried.begin_stage()
        self._rng.begin(index)
        method = getattr(self.root, name)
        interceptor = self.partition.interceptor
        # a step may change its batch, which this rank's next stage needs, too
        arguments = step.arguments[index] if len(self.local) == 1 else copied_batch(step.arguments[index])
        recording = step.context.recorder.recording(step.samples[index], run, stage, index)
        listed = program.trace.lists_parameters
        visible = self.partition.parameters.all_visible() if listed else nullcontext()
        reworded = patched(observer, reworded=True)
        with recording, interceptor.handled_by(run), self.precision(), checkpoints_not_reentrant(), visible, reworded:
            try:
                out = self.partition.step_module(_catching_stop(method, run), *arguments)
            except (GhostReadError, GhostWriteError) as error:
                layout = self.partition.plan.layout
                raise PartitionError(
                    f"`layout='{layout}'` divides the step into pipeline stages: {error} Use a layout without `pp`, "
                    f"such as '{layout.moved('pp', 'dp')}'."
                ) from error
        self._carried.end_stage(stage)
        if isinstance(out, _Stopped):
            return out.values
        if program.stop is not None:
            raise PartitionError(
                f"`{name}` ended before it reached `{program.trace.calls[program.stop].name}`, which it called in "
                "the dry run. A pipeline needs the same modules to be called in every microbatch."
            )
        if name != "training_step":
            return out
        step.extras[index] = extras(out)
        found = loss_of(out)
        if run.differs and isinstance(found, Ghost) and found.received is None:
            raise PartitionError(run.differs)
        loss, weight = self._loss(out, step), weight_of(out)
        if weight is not None:
            step.loss_weights[index] = weight
            step.losses.append(loss.detach())
            return step.context.weighted([weight * len(step.arguments)]).scaled(loss)
        if step.weights:
            loss = loss * step.weights[index]
        step.losses.append(loss.detach())
        return loss

    def _has_weights(self, unit: str) -> bool:
        return not any(isinstance(slot.tensor, Ghost) for slot in parameter_slots(self.root.get_submodule(unit)))

    def after_backward(self, stage: int) -> None:
        """Separates the gradients that the first of several backward passes of a stage has made."""
        if stage not in self._step.separated and self.parts > 1:
            self._step.separated.add(stage)
            self.separate_gradients()

    def _loss(self, out: Any, step: _Step) -> Tensor:
        loss = loss_of(out)
        if not isinstance(loss, Tensor):
            raise PartitionError(
                f"`training_step` must return a loss under a layout with `pp`. Got {type(loss).__name__}. To skip a "
                "batch, return a loss multiplied by 0."
            )
        if isinstance(loss, Ghost) and loss.received is None:
            layout = self.partition.plan.layout
            raise PartitionError(
                f"`layout='{layout}'`: the loss of {location_of(self.root.training_step)} is computed with a value of "
                "another pipeline stage that is not part of the step, such as a copy of its weights that a hook has "
                "kept. Compute the value from the weights in the step, or use a layout without `pp`, such as "
                f"'{layout.moved('pp', 'dp')}'."
            )
        return loss

    # ---- evaluation

    def evaluate(self, context: StepContext, args: tuple) -> Any:
        """Runs `validation_step`, `test_step` or `predict_step` on the whole batch, stage by stage.

        Returns:
            The result of the step, on every rank.
        """
        prepared = self._prepare(context.name, args, 1, train=False)
        self._carried.begin(prepared.contract, prepared.bounds, 1)
        self._running = _Step(context, [args], [count_samples(args[0])])
        plan, group = self.partition.plan, self.mesh.group("pp")
        values: tuple[Tensor, ...] = ()
        out: Any = None
        for stage in plan.stages:
            if stage.index not in self.local:
                continue
            program = prepared.programs[stage.index]
            if stage.index and plan.stages[stage.index - 1].index not in self.local:
                values = tuple(self._receive(v, plan.stages[stage.index - 1].rank) for v in program.received)
            result = self.run_stage(stage.index, program, values, 0)
            if program.stop is None:
                out = result
                break
            values = result
            if stage.index + 1 not in self.local:
                for value in values:
                    dist.send(value, dist.get_global_rank(group, plan.stages[stage.index + 1].rank), group=group)
        self._carried.end()
        return share_object(out, self.last_rank, self.mesh.group("pp"), self.device)

    @property
    def contract(self) -> StepContract:
        """The contract of the step that has run last."""
        return self._carried.contract

    def end_training_step(self) -> None:
        """Gives all ranks the state that the step has changed. Collective over the ranks of a pipeline."""
        self._carried.end()

    def _receive(self, value: CrossingValue, rank: int) -> Tensor:
        group = self.mesh.group("pp")
        tensor = value.example(self.device).detach()
        dist.recv(tensor, dist.get_global_rank(group, rank), group=group)
        return tensor

    # ---- preparation

    def _prepare_parts(self, args: tuple, count: int, requested: int | str) -> _Prepared | None:
        """Returns what runs `count` microbatches like that in `args`; None if the step fails on a part of the batch.

        Raises:
            PartitionError: If it fails, and the number was requested, or is 1.
        """
        try:
            return self._prepare("training_step", args, count)
        except PartitionError as error:
            failure = failure_of_step(error)
            if failure is None or count == 1:
                raise
            if count == requested:  # not of the last, smaller batch of an epoch
                reason = f"on a part of the batch the step fails at {failure}"
                raise PartitionError(refusal_of_microbatches(requested, reason)) from error
            return None

    def _prepare(self, name: str, args: tuple, count: int, train: bool = True) -> _Prepared:
        form = (name, count, signature(args[0]))
        # constants of a batch, and the index of a loader, may decide which modules the step calls
        key = form if form in self._alike else (form, signature((args[0], *args[2:]), values=True))
        if key in self.prepared:
            self.prepared.move_to_end(key)
            return self.prepared[key]
        if train:
            check_backward_hooks(self.root, self.partition.plan.layout, self.partition.interceptor.units.names)
        with self.partition.bare(), self.partition.parameters.all_visible():
            trace = trace_step(
                self.root,
                self.partition.interceptor,
                getattr(self.root, name),
                copied_batch(args),
                device=self.device,
                context=self.precision,
                gradients=name == "training_step",
            )
        bounds = stage_bounds(self.partition.plan, name, trace)
        prepared = _Prepared(self._programs(bounds, trace), trace.outline(), trace.contract, bounds)
        if name == "training_step":
            prepared.whole_batch = whole_batch_reason(self.root, trace.contract)
        if train:
            prepared.schedule = self._build_schedule(prepared, count)
        same = [p for k, p in self.prepared.items() if k[0] == form and p.outline == prepared.outline]
        if len(same) >= _ALIKE - 1:
            self._alike.add(form)
            key = form
        self.prepared[key] = prepared
        if len(self.prepared) > _KEPT_SHAPES:
            self.prepared.popitem(last=False)
        return prepared

    def _programs(self, bounds: list[int], trace: Trace) -> dict[int, StageProgram]:
        count = len(bounds) - 1
        return {
            s: StageProgram(trace=trace, first=bounds[s], stop=bounds[s + 1] if s + 1 < count else None)
            for s in self.local
        }

    def _build_schedule(self, prepared: _Prepared, count: int) -> Any:
        plan, group = self.partition.plan, self.mesh.group("pp")
        stages = []
        for s in self.local:
            program = prepared.programs[s]
            module = _StageModule(self, s, program)
            inputs = self._examples(program.received) if program.first else (torch.empty(1),)
            outputs = self._examples(program.sent)
            stages.append(
                _TimedStage(
                    module,
                    s,
                    len(plan.stages),
                    self.device,
                    input_args=inputs,
                    output_args=outputs,
                    group=group,
                    dw_builder=_nothing_left,
                )
            )
            stages[-1].pipeline = self
        name = runnable_schedule(plan.schedule, plan.layout.pp, count)
        single = len(stages) == 1
        return get_schedule_class(name)(
            stages[0] if single else stages,  # type: ignore[arg-type]
            n_microbatches=count,
            loss_fn=lambda loss, _: self._step.scaled(loss),
            scale_grads=False,
        )

    def _examples(self, values: Sequence[CrossingValue]) -> tuple[Tensor, ...]:
        examples = [value.example(self.device) for value in values]
        if not any(value.differentiable for value in values):  # a token, or the loss
            examples.append(torch.empty((), device=self.device, requires_grad=True))
        return tuple(examples)


@dataclass
class _Step:
    """State of the running step."""

    context: StepContext
    arguments: list[tuple]
    """Arguments of the step, by microbatch."""
    samples: list[float]
    """Weight of logged values, by microbatch."""
    scale: float | Tensor = 1.0
    weights: list[float] = field(default_factory=list)
    """Factors on the losses of microbatches; empty: all are equal."""
    extras: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Values that the step returned besides the loss, by microbatch."""
    separated: set[int] = field(default_factory=set)
    """Stages that have run a backward pass."""
    losses: list[Tensor] = field(default_factory=list)
    """Losses of microbatches as the user's step returned them, multiplied by `weights`."""
    loss_weights: dict[int, float] = field(default_factory=dict)
    """Weights that the user's step returned with the losses, by microbatch."""

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss of a microbatch whose gradient is computed."""
        return (loss if self.loss_weights else self.context.scaled(loss)) * self.scale


def _nothing_left() -> Callable[[], None]:
    """Returns an empty second half of a split backward pass: the first half computes the weights' gradients, too.

    torch's own split finds the weights of the second half on paths from the stage's input. It misses weights that only
    the batch leads to (a decoder's embedding), mixes up several inputs, and fails on some graphs (DeBERTa-v2).
    """
    return lambda: None


class _Stopped(NamedTuple):  # a tuple, so that hooks of the step module find the tensors in it
    values: tuple[Tensor, ...]


def _catching_stop(method: Callable[..., Any], handler: StageRun) -> Callable[..., Any]:
    """Returns `method` with `StopStage` turned into a result, since hooks of the step module must run to the end."""

    def run(*args: Any) -> Any:
        try:
            with nullcontext() if handler.free is None else handler.free:
                return method(*args)
        except StopStage as stop:
            return _Stopped(stop.values)

    return run
