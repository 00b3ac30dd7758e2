"""The partitioned module at work: one step of training or evaluation under any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_hybrid._lightning_private import evaluation_batch, training_batch
from lightning_hybrid._torch_private import finish_sharded_backward, gradients_taken_by
from lightning_hybrid.batches import count_samples
from lightning_hybrid.collectives import gather_objects, to_local
from lightning_hybrid.dataloader.sharding import BatchWeights
from lightning_hybrid.engine.clocks import Clocks
from lightning_hybrid.engine.exchange import StepExchange
from lightning_hybrid.engine.gradient_noise import GradientNoise
from lightning_hybrid.engine.pipeline import Pipeline
from lightning_hybrid.metrics.hook_logs import HookLogs
from lightning_hybrid.metrics.logs import LogRecorder, leave_out
from lightning_hybrid.metrics.stages import StageOutputs
from lightning_hybrid.metrics.step_logs import StepLogs
from lightning_hybrid.metrics.torchmetrics import Metrics
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.replicas.batch_norm import has_batch_norm
from lightning_hybrid.replicas.diloco import DiLoCo
from lightning_hybrid.replicas.reducer import (
    DeliverGradients,
    ReplicaReducer,
    StashedGradients,
    gradients_of,
    refuse_gradients,
    sum_over_holders,
)
from lightning_hybrid.rng.step import StepRNG
from lightning_hybrid.spec.stages import choose_microbatches


class StepRunner:
    """Runs steps of a partitioned LightningModule.

    Args:
        root: The LightningModule.
        partition: Its applied partition.
        device: This rank's device.
        precision: Lightning's precision plugin.
        microbatches: Microbatches of a training step, or `"auto"`.
    """

    def __init__(
        self,
        root: pl.LightningModule,
        partition: Partition,
        device: torch.device,
        precision: Precision,
        microbatches: int | str,
    ) -> None:
        self.root, self.partition, self.device, self.precision = root, partition, device, precision
        self.mesh = partition.mesh
        self.one_microbatch = has_batch_norm(root)  # whose statistics are those of the whole batch
        self.microbatches = 1 if self.one_microbatch else microbatches
        self.noise: GradientNoise | None = None
        """Measures the noise of gradients, where it is wanted."""
        self.clocks: Clocks | None = None
        """Measure how long this rank computes, where it is wanted."""
        self.optimizer_names: dict[int, list[list[str]]] = {}
        self._sync = True
        self.gradients_are_seen = False
        """Whether a hook of the user, on any rank, sees the gradients of every accumulated batch."""
        self.batch_weights: BatchWeights | None = None
        self._share = 1.0
        self.padding = False
        layout = partition.plan.layout
        self.metrics = Metrics(root, self.mesh, device)
        self.hook_logs = HookLogs(root, self.mesh, device)
        self.exchange = StepExchange(device, StepLogs(root, self.mesh, device, self.metrics))
        partition.on_remove = self._release
        self.streams = StepRNG(device, self.mesh.replica, self.mesh.rank("tp"))
        partition.interceptor.rng = self.streams
        if partition.tensor is not None:
            partition.tensor.use_rng(self.streams)
        self.pipeline: Pipeline | None = None
        if layout.pp > 1:
            self.pipeline = Pipeline(
                root, partition, self.mesh, device, precision.forward_context, self.metrics, self.streams
            )
            self.stage_outputs = StageOutputs(self.mesh, device, self.pipeline.last_rank)
        local = partition.parameters.local()
        names = partition.whole.intersection(local) if layout.fsdp > 1 else local
        self._steps_alone = partition.plan.gradient_sync.kind == "diloco" and layout.replicas > 1
        self._reduced = {n: local[n] for n in local if n in names} if layout.replicas > 1 else {}
        self.diloco: DiLoCo | None = None
        """Where replicas step by themselves."""
        self._reduction = partition.reduction()
        self._trained: list[bool] = []
        self._reducers: list[ReplicaReducer] = []
        self._follow_frozen()

    def _follow_frozen(self) -> None:
        """Makes the reducers anew if parameters have been frozen or unfrozen since the last step."""
        trained = [p.requires_grad for p in self._reduced.values()]
        if trained == self._trained:
            return
        self._trained = trained
        self._release()
        wanted = {n: p for n, p in self._reduced.items() if p.requires_grad}
        if self._steps_alone:
            if self.diloco is not None:
                self.diloco.agree()
            self.diloco = DiLoCo(wanted, self.mesh.replica_group, self.partition.plan.gradient_sync)
            return
        experts = [n for n in wanted if self.partition.expert_plan_of(n) is not None]
        replicas = self.mesh.layout.replicas
        self._reducers = [
            ReplicaReducer([wanted[n] for n in names], group, replicas, self._reduction)
            for names, group in (
                ([n for n in wanted if n not in experts], self.mesh.replica_group),
                (experts, self.mesh.group("dp")),
            )
            if names
        ]
        for reducer in self._reducers:
            reducer.enabled = self._sync
            reducer.on_complete = self.gradients_complete
            if self.pipeline is None:
                reducer.overlap()

    @property
    def sent_bytes(self) -> float:
        """What this rank sends to agree with other replicas on the gradients of a step; its weights not counted."""
        layout, total = self.mesh.layout, sum(reducer.sent_bytes for reducer in self._reducers)
        if self.diloco is not None:
            total += self.diloco.sent_bytes
        if layout.fsdp > 1:
            item = 2 if self.partition.plan.gradient_sync.kind in ("bf16", "bf16_fp32acc") else None
            for name, parameter in self.partition.parameters.local().items():
                if parameter.requires_grad and name not in self.partition.whole:
                    shards = layout.shards if self.partition.expert_plan_of(name) is None else layout.fsdp
                    own = to_local(parameter.detach())
                    total += (shards - 1) * own.numel() * (item or own.element_size())
        return total

    def time_computation(self, clocks: Clocks | None) -> None:
        """From now on these clocks run; None: none."""
        if self.clocks is not None:
            self.clocks.release()
        self.clocks = clocks
        if clocks is not None:
            clocks.time_calls(self.partition.sharded_blocks())
        if self.pipeline is not None:
            self.pipeline.clocks = clocks

    def gradients_complete(self) -> None:
        """This rank has computed its gradients of a batch; it may wait for others now."""
        if self.clocks is not None:
            self.clocks.end_batch()

    def _release(self) -> None:
        """The partition is taken off."""
        for reducer in self._reducers:
            reducer.release()

    @property
    def _sharded(self) -> FSDPModule | None:
        return self.partition.step_module if isinstance(self.partition.step_module, FSDPModule) else None

    def install_logs(self) -> None:
        """While the trainer runs, what hooks log and the states of metrics are those of all replicas."""
        self.hook_logs.install()
        self.metrics.install()

    def remove_logs(self) -> None:
        """Ends it."""
        self.hook_logs.remove()
        self.metrics.remove()

    # ---- the batch

    def microbatches_of(self, samples: int) -> int:
        """Into how many microbatches a training batch of so many samples of this replica is split."""
        plan = self.partition.plan
        if self.pipeline is None or self.microbatches == 1:
            return 1
        return choose_microbatches(samples, self.microbatches, plan.layout.pp, plan.schedule)

    def take_batch(self, batch_weights: BatchWeights | None, share: float = 1.0) -> None:
        """What is said of the next step's batch.

        Args:
            batch_weights: None if every replica has equally many samples.
            share: The factor on its loss among those of accumulated batches.
        """
        self.batch_weights, self._share = batch_weights, share
        self.padding = batch_weights is not None and batch_weights.padding(self.mesh.replica)
        self.partition.padding = self.metrics.padding = self.hook_logs.padding = self.padding

    @property
    def factor(self) -> float:
        """The factor on this replica's loss with which the mean over replicas is that over the global batch."""
        if self.batch_weights is None:
            return 1.0
        if self.diloco is not None:  # the mean over this replica's own batch
            return 0.0 if self.padding else self._share
        return self.batch_weights.factor(self.mesh.replica) * self._share

    # ---- training

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One `training_step` of the user, under the layout; what it logs is logged on every rank."""
        self._follow_frozen()
        self.metrics.begin_step()
        if self.clocks is not None:
            self.clocks.begin_batch(self.pipeline.local if self.pipeline is not None else [])
        with self.streams.training(training_batch(self.root.trainer)):
            if self.pipeline is not None:
                return self._pipelined_step(self.pipeline, *args)
            self.streams.begin(0)
            return self._whole_step(*args, **kwargs)

    def _whole_step(self, *args: Any, **kwargs: Any) -> Any:
        recorder, watched = LogRecorder(self.root), self.metrics.watching(self.partition.interceptor)
        recording, refused = recorder.recording(count_samples(args[0])), self._gradients_refused()
        with self.precision.train_step_context(), recording, watched, refused:
            out = self.partition.step_module(self.root.training_step, *args, **kwargs)
        self._log("training_step", recorder)
        self._note_parts(args[0], 1)
        return out

    def _note_parts(self, batch: Any, parts: int) -> None:
        if self.noise is not None:
            self.noise.saw_batch(count_samples(batch), parts, self.batch_weights is None)

    def _gradients_refused(self) -> AbstractContextManager:
        layout = self.mesh.layout
        return gradients_taken_by(refuse_gradients(layout)) if layout.fsdp > 1 else nullcontext()

    def _pipelined_step(self, pipeline: Pipeline, *args: Any) -> Any:
        local = self.partition.parameters.local()  # sharded, where `fsdp` divides them
        shared = {name: local[name] for name in self.partition.tied_weight_groups}
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(False)
            self._sharded.set_is_last_backward(False)
            self._sharded.set_reshard_after_backward(False)
        stashed = StashedGradients(p for p in local.values() if p.requires_grad)
        scale: Any = 1.0 / self.root.trainer.accumulate_grad_batches
        scaler = getattr(self.precision, "scaler", None)
        if scaler is not None:  # Lightning scales a loss whose gradients the schedule has computed already
            scale = scaler.scale(torch.tensor(scale, device=self.device))
        common = None if self.batch_weights is None else self.batch_weights.common_divisor
        tokens = None if self.batch_weights is None else self.batch_weights.tokens
        loss, recorder, extras = pipeline.train(args, scale * self.factor, self.microbatches, common, tokens)
        self._note_parts(args[0], pipeline.parts)
        stashed.keep()
        mean_loss, extras = self._log("training_step", recorder, loss, extras)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        mean_loss = DeliverGradients.apply(anchor, mean_loss, partial(self._deliver, stashed, shared))
        return {"loss": mean_loss, **extras} if extras else mean_loss

    def _deliver(self, stashed: StashedGradients, shared: Mapping[str, Tensor]) -> None:
        summed = gradients_of(shared) if self.gradients_are_seen else {}
        stashed.add()
        if self._sync:
            if self._sharded is not None:
                finish_sharded_backward(self._sharded)
            for reducer in self._reducers:
                reducer.finish()
            sum_over_holders(self.partition.tied_weight_groups, shared.__getitem__, summed)

    def _log(
        self,
        step: str,
        recorder: LogRecorder,
        loss: Tensor | None = None,
        extras: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logs a step on every rank, now or with the check of its gradients; gives every stage the last one's loss."""
        entries = recorder.entries
        if self.padding:
            leave_out(entries)
        shared, returned = torch.zeros(()), extras or {}
        if self.pipeline is not None and step == "training_step":
            shared, returned = self.stage_outputs.share(loss, returned)
        self.exchange.logs.take(step, entries)
        if step != "training_step" or not self.exchange.check_follows:
            with self.clocks.waiting() if self.clocks is not None else nullcontext():
                self.exchange.run()
        return shared, returned

    @contextmanager
    def gradients_stay_local(self) -> Iterator[None]:
        """Inside, backward passes accumulate without communication (all but the last accumulated batch).

        Not where a hook of the user sees the gradients in between.
        """
        self._set_sync(self.gradients_are_seen)
        try:
            yield
        finally:
            self._set_sync(True)

    def _set_sync(self, sync: bool) -> None:
        self._sync = sync
        for reducer in self._reducers:
            reducer.enabled = sync
        if self._sharded is not None and self.pipeline is None:
            self._sharded.set_requires_gradient_sync(sync)

    # ---- evaluation

    def evaluation_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """One `validation_step`, `test_step` or `predict_step` on the whole batch; its result on every rank."""
        step: Callable[..., Any] = getattr(self.root, name)
        self.metrics.begin_step()
        with self.streams.evaluation(name, evaluation_batch(self.root.trainer)):
            if self.pipeline is not None:
                out, recorder = self.pipeline.evaluate(name, args)
            else:
                self.streams.begin(0)
                recorder, watched = LogRecorder(self.root), self.metrics.watching(self.partition.interceptor)
                with self.precision.forward_context(), recorder.recording(count_samples(args[0])), watched:
                    out = self.partition.step_module(step, *args, **kwargs)
        if recorder.entries or name != "predict_step":
            self._log(name, recorder)
        return out

    # ---- optimizers

    @contextmanager
    def parameters_for_optimizers(self, strategy: Strategy) -> Iterator[None]:
        """Inside, `configure_optimizers` sees every parameter; afterwards the optimizers hold this rank's only."""
        parameters = self.partition.parameters
        names = {}
        with parameters.all_visible() as ghosts:
            names = {id(parameters.visible(n)): n for n in parameters.names}
            yield
        self.optimizer_names = {}
        for optimizer in strategy.optimizers:
            self.optimizer_names[id(optimizer)] = [
                [names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups
            ]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ghosts]

    def names_in(self, optimizer: Optimizer) -> list[list[str]]:
        """The names of all parameters of each group of an optimizer, on other stages too.

        Collective if the user has added groups since the last call (`add_param_group`); in these, names are in the
        model's order.
        """
        known = self.optimizer_names[id(optimizer)]
        names = {id(p): n for n, p in self.partition.parameters.local().items()}
        own = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups[len(known) :]]
        if own:
            for groups in zip(*gather_objects(own), strict=True):
                members = set().union(*groups)
                known.append([n for n in self.partition.parameters.names if n in members])
        return known

    # ---- experts

    def expert_loads(self) -> dict[str, Tensor]:
        """Tokens that went to each expert in training since the last call, by module of experts. Collective."""
        experts = self.partition.experts
        if experts is None:
            return {}
        taken = experts.collect_loads()
        loads = {
            name: taken.get(name, torch.zeros(plan.experts, dtype=torch.long, device=self.device))
            for name, plan in experts.plans.items()
        }
        together = torch.cat(list(loads.values()))
        dist.all_reduce(together)
        together //= self.mesh.layout.tp  # whose ranks have sent the same tokens
        return dict(zip(loads, together.split([plan.experts for plan in experts.plans.values()]), strict=True))
