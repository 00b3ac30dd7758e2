"""`HybridStrategy`: Lightning's hooks, each handing over to the room that does the work."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hybrid._lightning_private import evaluation_batch
from lightning_hybrid._torch_private import limit_waiting
from lightning_hybrid.batches import split_sequences
from lightning_hybrid.checkpoint import state
from lightning_hybrid.checkpoint.checkpoints import Checkpoints
from lightning_hybrid.checkpoint.options import CheckpointOptions
from lightning_hybrid.compat.averaging import follow_partition
from lightning_hybrid.compat.callbacks import follow_callbacks
from lightning_hybrid.dataloader.replica import ReplicaData
from lightning_hybrid.dataloader.sharding import BatchWeights
from lightning_hybrid.engine import start
from lightning_hybrid.engine.optimizer import OptimizerWrapper
from lightning_hybrid.launch import agreement
from lightning_hybrid.launch.launcher import HybridLauncher
from lightning_hybrid.launch.monitor import FailureMonitor
from lightning_hybrid.launch.processes import DEFAULT_TIMEOUT, meet
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.partitioned import PartitionedStrategy, Schedule
from lightning_hybrid.replicas.reducer import seen_after_backward
from lightning_hybrid.rng.state import agree
from lightning_hybrid.spec.gradient_sync import GradientSync
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.plan import Recompute
from lightning_hybrid.spec.request import Request
from lightning_hybrid.spec.tensor_plan import renamed_choices


class HybridStrategy(PartitionedStrategy):
    """Trains any LightningModule, unmodified, under a layout: replicas, sharding, experts, tensors, a pipeline.

    Args:
        layout: Sizes of the axes, such as `"dp2-tp2-pp2"`; their product is the number of devices. None: `fsdp` over
            all devices. Or the path of a plan (`plan.yaml`) that `strategy.plan.to_yaml` has written: the run uses it
            as it is, and arguments beside it, where they are not left at their defaults, must say the same.
        schedule: The pipeline schedule: `GPipe`, `1F1B`, `Interleaved1F1B`, `ZBVZeroBubble` or `DualPipeV`.
        microbatches: Into how many parts a replica's batch is split under `pp`; `"auto"` chooses.
        tensor_plan: Overrides of the inferred tensor plan: patterns of module names to `"colwise"`, `"rowwise"`,
            `"colwise_gather"` or `"replicate"`.
        compile: Compile each block with `torch.compile`.
        recompute: What the backward pass computes again instead of keeping it: `"full"`, every block; `"selective"`,
            everything in a block but matmuls and attention, and of matmuls the up-projections of latents.
        checkpoints: How checkpoints are saved, and what is trusted when they are loaded.
        on_nonfinite: What all ranks do when a gradient or the loss is NaN or infinite on any of them, before the
            update: `"raise"` `NonFiniteError`, or `"skip"` the step.
        gradient_sync: How replicas agree on gradients: `"exact"`; `"bf16"`, sent and added up in bfloat16;
            `"bf16_fp32acc"`, sent in bfloat16 and added up in float32; `"hierarchical"`, within a node first;
            `"diloco"`, not at all: replicas step by themselves and agree every few steps. Or a `GradientSync`.
        process_group_backend: `"nccl"`, `"gloo"`; None chooses by device.
        timeout: How long the start and collectives wait for another rank; then the run ends, and the error names the
            rank that did not come and where it is.

    Raises:
        ValueError: If an argument is not one of its possible values.
    """

    def __init__(
        self,
        layout: str | Layout | None = None,
        *,
        schedule: Schedule = "1F1B",
        microbatches: int | Literal["auto"] = "auto",
        tensor_plan: Mapping[str, str] | None = None,
        compile: bool = False,
        recompute: Recompute | None = None,
        checkpoints: CheckpointOptions = CheckpointOptions(),  # noqa: B008 -- frozen
        on_nonfinite: Literal["raise", "skip"] = "raise",
        gradient_sync: str | GradientSync = "exact",
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"`on_nonfinite` must be 'raise' or 'skip'. Got {on_nonfinite!r}.")
        request = Request(
            layout=Layout(),
            schedule=schedule,
            microbatches=microbatches,
            tensor_plan=renamed_choices(tensor_plan),
            gradient_sync=GradientSync.of(gradient_sync),
            recompute=recompute,
            compile=compile,
        )
        given, request = request.in_layout(layout)
        super().__init__(
            process_group_backend, FailureMonitor(timeout or DEFAULT_TIMEOUT), given, request, on_nonfinite, timeout
        )
        self.checkpoints = Checkpoints(checkpoints, timeout)
        self._splits_data: bool | None = None

    # ---- what Lightning asks about

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.mesh.layout.replicas, "rank": self.mesh.replica}

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    # ---- start

    @override
    def _configure_launcher(self) -> None:
        environment = self._environment
        try:
            self.layout.validate(self.num_nodes * self.num_processes)
        except ValueError:
            if max(environment.global_rank(), environment.local_rank()) > 0:
                start.leave_quietly()
            raise
        # with processes that are there already it only shares out the cores, without which each rank takes all of them
        self._launcher = HybridLauncher(environment, self.num_processes, self.num_nodes, self._watch)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._set_world_ranks()
        self._backend = self._backend or _get_default_process_group_backend_for_device(self.root_device)
        device_id = self.root_device if self._backend == "nccl" else None
        self._meet()
        _init_dist_connection(self._environment, self._backend, timeout=self._timeout, device_id=device_id)
        self._mesh = Mesh.create(self.layout, self.root_device.type)
        limit_waiting(self._timeout or DEFAULT_TIMEOUT)
        agree([])  # so that samplers and initial weights are the same everywhere
        trainer = self._module.trainer
        if self.world_size > 1:
            self._preemption.install(trainer)
        self._splits_data = start.prepare_trainer(trainer)
        self._data = ReplicaData(
            trainer, self._mesh, self.root_device, split=self._splits_data, run_padding=self._run_padding
        )

    def _meet(self) -> None:
        if self.world_size == 1:
            return
        arguments = self.request.arguments() | {"on_nonfinite": self._on_nonfinite}
        facts = agreement.facts_of(self._module.trainer, arguments)
        check = self._watch.check_children
        with self._watch.during("the meeting of the ranks"):
            party = meet(self._environment, self.global_rank, self.world_size, self._timeout, facts, check)
        self._watch.connect(party)
        agreement.check_facts(party.facts)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        return self.data.process(dataloader)

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        with start.built_on_ghosts(self.lightning_module):
            yield

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        with self.precision_plugin.tensor_init_context():  # on the CPU, as in one process; the device comes later
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if self.accelerator is not None:
            self.accelerator.setup(trainer)
        if self._runner is None or self._runner.root is not self.lightning_module:
            self._request = self._request.for_another_module()
            self.model = self.precision_plugin.convert_module(self._module)
            self._runner = start.partition(trainer, self, self.request)
            limit_waiting(self._timeout or DEFAULT_TIMEOUT)  # of the groups that the partition has made
        self._runner.install_logs()
        follow_partition(trainer, self._runner)
        follow_callbacks(trainer, self._runner)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self._runner.gradients_are_seen = self.reduce_boolean_decision(seen_after_backward(trainer), all=False)
        self.setup_precision_plugin()
        if self._steps is None or self._steps.runner is not self._runner:
            self._steps = OptimizerWrapper(self.runner, self.precision_plugin, self._on_nonfinite, self._preemption)
        self._steps.check_optimizers(self.optimizers)
        self._steps.install()

    @override
    def model_to_device(self) -> None:
        """Nothing: partitioning moves this rank's part to the device."""

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self._reset_optimizers_and_schedulers()
        self.runner.partition.reshard()
        with self.runner.parameters_for_optimizers(self):
            super().setup_optimizers(trainer)

    # ---- steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        batch_weights = self.data.batch_weights()
        self.runner.take_batch(batch_weights, self.data.share_in_step(batch_weights))
        if self.sequence_length is not None:
            args = (split_sequences(args[0], self.sequence_length), *args[1:])
        with self._during("training_step"):
            return self.runner.training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self.runner.batch_weights is not None:
            closure_loss = closure_loss * self.runner.factor
        with self._during("backward"):
            loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        self.runner.gradients_complete()
        return loss

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._watch.during("predict_step", evaluation_batch(self._module.trainer) - 1):
            out = self.runner.evaluation_step("predict_step", *self.data.numbered(args), **kwargs)
        self.data.go_along()
        return out

    def _evaluate(self, step: str, *args: Any, **kwargs: Any) -> Any:
        trainer = self._module.trainer
        self.runner.take_batch(self.data.batch_weights())
        with self._watch.during(step, evaluation_batch(trainer) - 1):
            out = self.runner.evaluation_step(step, *args, **kwargs)
            self._preemption.agree(trainer)
            return out

    def _run_padding(self, batch: Any, batch_weights: BatchWeights) -> None:
        self.runner.take_batch(batch_weights)
        self.runner.evaluation_step("predict_step", *start.prediction_arguments(self._module.trainer, batch))
        self.runner.take_batch(None)

    def on_train_start(self) -> None:
        """Says what a step's gradients cost."""
        self._log_sent_bytes()

    def on_train_end(self) -> None:
        """Replicas that have stepped by themselves agree on the weights."""
        if self.runner.diloco is not None:
            self.runner.diloco.agree()

    def on_predict_start(self) -> None:
        """Refuses loaders on which predictions would not be complete."""
        self.data.check_predictions()

    def on_predict_end(self) -> None:
        """Gives every rank all predictions."""
        self.data.finish_predictions()

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        with self.runner.gradients_stay_local():
            yield

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        self.steps.nonfinite.saw_loss(closure_loss)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        return self.steps.step(super().optimizer_step, optimizer, closure, model, **kwargs)

    # ---- state

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's parts; `full_state_dict` gives whole weights."""
        return {} if self._watch.failing or self.moving else state.state_dict(self.runner)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {} if self._watch.failing or self.moving else state.optimizer_state(self.runner, optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if self._watch.failing or self.moving:
            self._watch.note_unsaved(filepath)
            return
        with self._during("save_checkpoint"):
            self.checkpoints.save(self.runner, checkpoint, filepath)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        self.checkpoints.saver.remove(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoints.load(self.runner, checkpoint_path, trust_pickle=weights_only is False)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state.load_state_dict(self.runner, checkpoint["state_dict"], strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state.load_optimizer_state(self.runner, optimizer, saved)
        self.checkpoints.restore_rng(self.runner)
        self.checkpoints.restore_diloco(self.runner)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        self.checkpoints.first_batch(self._module.trainer)
        return super().batch_to_device(batch, device, dataloader_idx)

    # ---- end

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.checkpoints.abandon()

    @override
    def teardown(self) -> None:
        self.checkpoints.wait()
        if self._steps is not None:
            self._steps.remove()
        if self._runner is not None:
            self._runner.remove_logs()
        if self.lightning_module is not None and self._splits_data is not None:
            start.release_trainer(self.lightning_module.trainer, self._splits_data)
        self._environment.teardown()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()
        self._watch.torn_down()
