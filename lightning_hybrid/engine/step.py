"""Runs one training or evaluation step of a partitioned module, under any layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_hybrid._lightning_private import evaluation_batch, running_batch, training_batch
from lightning_hybrid._torch_private import FlopCount, location_of, persistent_buffers
from lightning_hybrid.batches import count_samples
from lightning_hybrid.collectives import to_local
from lightning_hybrid.dataloader.sharding import BatchWeights
from lightning_hybrid.engine.clocks import Clocks, ClockSet
from lightning_hybrid.engine.context import StepContext
from lightning_hybrid.engine.exchange import StepExchange
from lightning_hybrid.engine.first_batch import prediction_arguments
from lightning_hybrid.engine.gradient_noise import GradientNoise
from lightning_hybrid.engine.gradients import ReplicaGradients
from lightning_hybrid.engine.loss_weights import BY_MICROBATCH, LossWeights, check_weights, weight_of
from lightning_hybrid.engine.order import collective_order
from lightning_hybrid.engine.pipeline import Pipeline
from lightning_hybrid.engine.raw_backward import unweighted_backward_refused, weighted_backward
from lightning_hybrid.engine.run import Run
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.preserve import preserved_user_state
from lightning_hybrid.ghosts.trace import Tracer
from lightning_hybrid.metrics.logs import LogRecorder, leave_out
from lightning_hybrid.metrics.outputs import NOT_JOINED, NotJoinedError
from lightning_hybrid.metrics.stages import StageOutputs
from lightning_hybrid.metrics.step_logs import StepLogs
from lightning_hybrid.metrics.torchmetrics import Metrics
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.replicas.reducer import DeliverGradients
from lightning_hybrid.replicas.written import check_equal, check_equal_buffers
from lightning_hybrid.rng.step import StepRNG
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.stages import choose_microbatches

_FIRST_STEPS = 4
"""Steps in which weights of replicas are compared, too. Later ones have one small collective."""


class StepRunner:
    """Runs steps of a partitioned LightningModule.

    Args:
        partition: The applied partition of the module.
        run: The present run.
        microbatches: Number of microbatches of a training step, or `"auto"`.
        rng: Sets the RNG state of steps and units.
        metrics: The torchmetrics objects of the module.
    """

    def __init__(
        self,
        partition: Partition,
        run: Run,
        microbatches: int | str,
        rng: StepRNG,
        metrics: Metrics,
    ) -> None:
        self.root: pl.LightningModule = partition.root  # type: ignore[assignment]
        self.partition, self.run, self.mesh = partition, run, partition.mesh
        self.device, self.precision = run.device, run.precision
        self.microbatches = microbatches
        self.rows_per_sample = 1
        """Number of rows on dim 0 into which each sample of the loader has been split."""
        self.noise: GradientNoise | None = None
        """Gradient noise measurement; None: not measured."""
        self.clocks = ClockSet()
        """Clocks that measure this rank's time."""
        self.flops: FlopCount | None = None
        """Counts the operations of training steps; None: not counted."""
        self.context: StepContext | None = None
        """Context of the running step, or else of the last step."""
        self._steps = 0
        self.samples: Counter[str] = Counter()
        """Samples of this replica in the present epoch, without padding, by name of the step."""
        self.rng, self.metrics = rng, metrics
        logs = StepLogs(self.root, self.mesh, run.device, metrics)
        self.order = collective_order(partition, run.world)
        self.order.in_step = lambda: self.run.in_step > 0
        self.exchange = StepExchange(run.device, logs, run.world, partition.missing, self.order)
        self.stage_outputs: StageOutputs | None = None
        self.pipeline: Pipeline | None = None
        if partition.plan.layout.pp > 1:
            step_context = lambda: self.run.step_context()  # noqa: E731 -- of the present run
            self.pipeline = Pipeline(self.root, partition, self.mesh, run.device, step_context, metrics, rng)
            self.pipeline.clocks = self.clocks
            self.stage_outputs = StageOutputs(self.mesh, run.device, self.pipeline.last_rank)
        self.gradients = ReplicaGradients(partition, self.gradients_complete, self.clocks.waiting)
        self.loss_weights = LossWeights(self.root, self.mesh, run.device)
        if self.pipeline is not None:
            self.pipeline.separate_gradients = self.gradients.separate

    @property
    def one_microbatch(self) -> bool:
        """True if a pipeline must not split a training batch."""
        return (self.partition if self.pipeline is None else self.pipeline).whole_batch is not None

    def time_computation(self, clocks: Clocks) -> None:
        """Measures this rank's computation time with `clocks`, until `clocks.release`."""
        clocks.time_calls(self.partition.sharded_blocks())
        self.clocks.add(clocks)
        clocks.on_release = lambda: self.clocks.remove(clocks)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Surrounds a backward pass."""
        self.order.next("runs a backward pass")
        if self.pipeline is None:
            self.gradients.follow_frozen()  # the step may have unfrozen weights
        with self._counted(), self.gradients.reducing(), self.gradients.backward(), weighted_backward():
            yield
        self.order.next("has run a backward pass")

    def announce(self, collective: str) -> bool:
        """Announces a collective of the user's code; returns False in a dry run."""
        if isinstance(self.partition.interceptor.active, Tracer):
            return False
        self.order.next(collective)
        return True

    def gradients_complete(self) -> None:
        """Ends the batch on the clocks; called when this rank has computed its gradients, before waits for others."""
        self.clocks.end_batch()

    def _counted(self) -> AbstractContextManager:
        return nullcontext() if self.flops is None else self.flops

    # ---- the batch

    def microbatches_of(self, samples: int) -> int:
        """Returns the number of microbatches for a training batch of `samples` samples per replica."""
        plan = self.partition.plan
        if self.pipeline is None or self.one_microbatch or self.microbatches == 1:
            return 1
        return choose_microbatches(samples, self.microbatches, plan.layout.pp, plan.schedule)

    @property
    def padding(self) -> bool:
        """True if the samples of the running step, or else of the last step, are padding on this replica."""
        return self.context is not None and self.context.padding

    @property
    def mean_factor(self) -> float:
        """The factor on this replica's mean over the batch of the running step, in the mean over replicas."""
        weights = None if self.context is None else self.context.weights
        return 1.0 if weights is None else weights.factor(self.mesh.replica)

    @property
    def predicts(self) -> bool:
        """True if the running step, or else the last step, is one of prediction, which replicas run independently."""
        return self.context is not None and self.context.name == "predict_step"

    def _begin(
        self, name: str, weights: BatchWeights | None, share: float = 1.0, weight_unit: float = 1.0
    ) -> StepContext:
        """Creates the context of a step.

        Args:
            name: Name of the step function.
            weights: Batch weights; None if all replicas have the same number of samples.
            share: Factor on the loss of this batch among the accumulated batches.
            weight_unit: About the weight of a batch, see `StepContext`.
        """
        replica = self.mesh.replica
        padding = weights is not None and weights.padding(replica)
        factor = 1.0
        if weights is not None and self.gradients.diloco is not None:  # the mean over this replica's own batch
            factor = 0.0 if padding else share
        elif weights is not None:
            factor = weights.factor(replica) * share
        self.context = StepContext(
            name=name,
            recorder=LogRecorder(self.root),
            weights=weights,
            loss_factor=factor,
            padding=padding,
            weight_unit=weight_unit,
        )
        self.metrics.begin_step()
        self.order.begin(name if self.gradients.reduces else f"{name}: accumulates")
        return self.context

    # ---- training

    def known_samples(self) -> int | None:
        """Returns the number of samples of the trainer's batch, as rows of its tensors; None: not known."""
        read = self.run.data.batch_samples()
        return None if read is None else read * self.rows_per_sample

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one `training_step` of the user on a batch of the trainer's loop; logs its values on every rank."""
        weights = self.run.data.batch_weights()
        share = self.run.data.share_in_step(weights)
        with self.run.during("training_step"):
            unit = self.loss_weights.unit(args[0] if args else None)
            samples = self.known_samples()
            self._count_samples("training_step", running_batch(self.root.trainer), weights, args)
            with self._counted():
                out = self.weighted_step(weights, share, *args, weight_unit=unit, samples=samples, **kwargs)
            if self.context is not None:
                self.loss_weights.take(self.context, self.run.world.any_rank)
            return out

    def _count_samples(self, name: str, number: int, weights: BatchWeights | None, args: tuple) -> None:
        """Counts the samples of a step, where `number` is that of the batch in its epoch."""
        own = count_samples(args[0]) if weights is None and args else 0
        before = self.samples[name] if number else 0
        self.samples[name] = before + (own if weights is None else weights.counts[self.mesh.replica])

    def weighted_step(
        self,
        weights: BatchWeights | None,
        share: float,
        *args: Any,
        weight_unit: float = 1.0,
        samples: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs one `training_step` of the user under the layout.

        Args:
            weights: Batch weights; None if all replicas have the same number of samples.
            share: Factor on the loss of this batch among the accumulated batches.
            *args: Arguments of `training_step`, the batch first.
            weight_unit: About the weight of a batch, see `StepContext`.
            samples: Number of samples of the batch if it is known.
            **kwargs: Keyword arguments of `training_step`.
        """
        self.gradients.follow_frozen()
        context = self._begin("training_step", weights, share, weight_unit)
        self.clocks.begin_batch(self.pipeline.local if self.pipeline is not None else [])
        with self.rng.training(training_batch(self.root.trainer)):
            if self.pipeline is not None:
                return self._pipelined_step(self.pipeline, context, samples, *args)
            self.rng.begin(0)
            return self._whole_step(context, *args, **kwargs)

    def _whole_step(self, context: StepContext, *args: Any, **kwargs: Any) -> Any:
        recording = context.recorder.recording(count_samples(args[0]))
        watched, refused = self.metrics.watching(self.partition.interceptor), self.gradients.refused_inside_step()
        weighted = unweighted_backward_refused(context, self.mesh.layout)
        with self.run.step_context(training=True), recording, watched, refused, weighted:
            out = self.partition.step_module(self.root.training_step, *args, **kwargs)
        self.gradients.keep_frozen()
        self._check_written()
        if self.root.automatic_optimization:
            self.order.next(
                "returns a loss" if out is not None else "returns no loss", location_of(self.root.training_step)
            )
        context = self._weighted(context, weight_of(out))
        self._log(context)
        self._note_parts(context, args[0], 1)
        return out

    def _weighted(self, context: StepContext, *weights: float | None) -> StepContext:
        """Returns the context of a step that has returned `weights` with its loss, by microbatch; None: it has not."""
        found = [w for w in weights if w is not None]
        whole = self.mesh.layout.replicas == self.mesh.layout.pp == self.root.trainer.accumulate_grad_batches == 1
        if not found or whole:  # a step of the optimizer has one loss
            return context
        if context.name == "training_step":
            diloco, noise = self.gradients.diloco is not None, self.noise is not None
            check_weights(self.root, diloco=diloco, noise=noise)
        self.context = context.weighted(found)
        return self.context

    def _check_written(self) -> None:
        """Refuses a step that has given parameters or buffers other values on each replica.

        Without a dry run, as under `dp`, it is not known which parameters a step writes: all are compared in steps 1,
        2 and 4, and those that are not trained, as all buffers, also in steps 8, 16 and so on.
        """
        if self.mesh.layout.replicas == 1:
            return
        self._steps += 1
        local, lines = self.partition.parameters.local(), self.partition.written
        compares_all = self._steps & (self._steps - 1) == 0
        where = location_of(self.root.training_step) if compares_all else ""
        if self.mesh.layout.fsdp == 1 and compares_all:
            differ = self._steps > _FIRST_STEPS or self.gradients.diloco is not None
            compared = (n for n, p in local.items() if not (differ and p.requires_grad))
            # experts of other ranks are other ones
            lines = dict.fromkeys((n for n in compared if self.partition.expert_plan_of(n) is None), where)
        written = {name: (to_local(p.detach()), lines[name]) for name, p in local.items() if name in lines}
        if written:
            check_equal(written, self.mesh.replica_group, self.mesh.layout)
        if compares_all and self.gradients.diloco is None:
            found = {n: to_local(b) for n, b in persistent_buffers(self.root).items() if not isinstance(b, Ghost)}
            if found:
                check_equal_buffers(found, where, self.mesh.replica_group, self.mesh.layout)

    def _note_parts(self, context: StepContext, batch: Any, parts: int) -> None:
        if self.noise is not None:
            self.noise.count_batch(count_samples(batch), parts, context.weights is None)

    def _pipelined_step(self, pipeline: Pipeline, context: StepContext, samples: int | None, *args: Any) -> Any:
        stashed, tied = self.gradients.begin_pipeline()
        scale: Any = 1.0 / self.root.trainer.accumulate_grad_batches
        scaler = getattr(self.precision, "scaler", None)
        if scaler is not None:  # Lightning scales a loss whose gradients the schedule has computed already
            scale = scaler.scale(torch.tensor(scale, device=self.device))
        trained = self._trained()
        loss, extras = pipeline.train(context, args, scale, self.microbatches, samples)
        self._check_frozen(trained)
        self._note_parts(context, args[0], pipeline.parts)
        stashed.keep()
        mean_loss, extras = self._share(loss, extras)
        if NOT_JOINED in extras:
            raise NotJoinedError(f"{extras[NOT_JOINED]} ({location_of(self.root.training_step)})")
        self._check_written()
        self._log(self._weighted(context, *extras.pop(BY_MICROBATCH, ())))
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        deliver = partial(self.gradients.finish_pipeline, stashed, tied, scale)
        mean_loss = DeliverGradients.apply(anchor, mean_loss, deliver)
        return {"loss": mean_loss, **extras} if extras else mean_loss

    def _trained(self) -> dict[str, bool]:
        return {name: p.requires_grad for name, p in self.partition.parameters.local().items()}

    def _check_frozen(self, before: dict[str, bool]) -> None:
        after = self._trained()
        changed = next((name for name, trained in before.items() if after[name] != trained), None)
        if changed is not None:
            layout = self.mesh.layout
            raise PartitionError(
                f"`layout='{layout}'`: {location_of(self.root.training_step)} freezes or unfreezes `{changed}` "
                "(`requires_grad`), for which the stages of a pipeline were not prepared. Do so in a hook, such as "
                f"`on_train_batch_start`, or use a layout without `pp`, such as '{layout.moved('pp', 'dp')}'."
            )

    def scaled_for_backward(self, loss: Tensor) -> Tensor:
        """Returns the loss whose gradient this replica contributes; a pipeline scales the loss in its schedule."""
        return loss if self.pipeline is not None or self.context is None else self.context.scaled(loss)

    def _share(self, loss: Tensor | None, extras: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Returns the last stage's loss and other results on every stage; also shares the state that has changed."""
        if self.pipeline is None or self.stage_outputs is None:
            return torch.zeros(()), extras
        self.pipeline.end_training_step()
        return self.stage_outputs.share(loss, extras)

    def _log(self, context: StepContext) -> None:
        """Logs a step on all ranks, now or with its gradient check."""
        entries = context.recorder.reduced(context.loss_weights)
        if context.padding:
            leave_out(entries)
        self.exchange.logs.take(context.name, entries)
        if context.name != "training_step" or not self.exchange.check_follows:
            with self.clocks.waiting():
                self.exchange.run()

    # ---- evaluation

    def evaluate(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Runs the step `name` of the user on a batch of the trainer's loop; all ranks stop here after a SIGTERM."""
        number, weights = evaluation_batch(self.root.trainer) - 1, self.run.data.batch_weights()
        self._count_samples(name, number, weights, args)
        with self.run.world.monitor.during(name, number):
            out = self._evaluation_step(name, weights, *args, **kwargs)
            self.run.world.preemption.agree(self.root.trainer)
            return out

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one `predict_step` on a batch of the trainer's loop, and those on padding that other replicas need."""
        data = self.run.data
        with self.run.world.monitor.during("predict_step", evaluation_batch(self.root.trainer) - 1):
            out = self._evaluation_step("predict_step", None, *data.numbered(args), **kwargs)
        data.run_padding_steps()
        return out

    def padding_step(self, batch: Any, weights: BatchWeights) -> None:
        """Runs `predict_step` on a padding batch, while other replicas predict on theirs."""
        self._evaluation_step("predict_step", weights, *prediction_arguments(self.root.trainer, batch))

    def _evaluation_step(self, name: str, weights: BatchWeights | None, *args: Any, **kwargs: Any) -> Any:
        """Runs one `validation_step`, `test_step` or `predict_step` on the whole batch.

        Args:
            name: Name of the step function.
            weights: Batch weights; None if all replicas have the same number of samples.
            *args: Arguments of the step, the batch first.
            **kwargs: Keyword arguments of the step.

        Returns:
            The result of the step, on every rank.
        """
        step: Callable[..., Any] = getattr(self.root, name)
        sharded = self.mesh.layout.fsdp > 1
        if not sharded and name != "predict_step":
            self.order.begin(name)
        with nullcontext() if sharded else self.order.paused():  # without shards, replicas evaluate independently
            return self._evaluated(name, step, weights, *args, **kwargs)

    def _evaluated(
        self, name: str, step: Callable[..., Any], weights: BatchWeights | None, *args: Any, **kwargs: Any
    ) -> Any:
        context = self._begin(name, weights)
        # what the step keeps of padding would count twice; the padding of a training step changes counters as all do
        unseen = preserved_user_state(self.root) if context.padding else nullcontext()
        with unseen, self.rng.evaluation(name, evaluation_batch(self.root.trainer)):
            if self.pipeline is not None:
                out = self.pipeline.evaluate(context, args)
            else:
                self.rng.begin(0)
                watched = self.metrics.watching(self.partition.interceptor)
                with self.run.step_context(), context.recorder.recording(count_samples(args[0])), watched:
                    out = self.partition.step_module(step, *args, **kwargs)
        if name != "predict_step":
            context = self._weighted(context, weight_of(out))
        if context.recorder.calls or name != "predict_step":
            self._log(context)
        return out
