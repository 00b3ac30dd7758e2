"""`HybridStrategy`: implements Lightning's hooks by the subpackages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from lightning_hybrid._lightning_private import EitherPackage, StrategyOfEither, accept_strategy
from lightning_hybrid._torch_private import warn_if_untested
from lightning_hybrid.batches import positions_of, split_sequences
from lightning_hybrid.checkpoint import state
from lightning_hybrid.checkpoint.checkpoints import Checkpoints
from lightning_hybrid.checkpoint.elsewhere import name_the_remedy
from lightning_hybrid.checkpoint.options import CheckpointOptions
from lightning_hybrid.compat.averaging import use_local_averages
from lightning_hybrid.dataloader.replica import ReplicaData
from lightning_hybrid.engine.build import build_engine, recorded_configure_model
from lightning_hybrid.engine.engine import Engine, Listener
from lightning_hybrid.engine.norms import gradient_norms
from lightning_hybrid.engine.run import Run
from lightning_hybrid.launch.launcher import HybridLauncher
from lightning_hybrid.launch.notebook import NOT_IN_NOTEBOOK, NotebookLauncher, launcher_here
from lightning_hybrid.launch.terminal import told_if_long
from lightning_hybrid.launch.world import World, set_ranks
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas.gather import gather_replicas
from lightning_hybrid.reshard.relayout import RelayoutResult, follow_layout, relayout
from lightning_hybrid.spec.gradient_sync import GradientSync
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.plan import Plan, Recompute
from lightning_hybrid.spec.request import LayoutOptions, Request, Schedule
from lightning_hybrid.spec.tensor_plan import renamed_choices
from lightning_hybrid.spec.verify import Verify
from lightning_hybrid.verification.verifier import Verifier

T = TypeVar("T")


class HybridStrategy(StrategyOfEither):
    """Trains any LightningModule, unmodified, under a layout: replicas, sharding, experts, tensors, a pipeline.

    Args:
        layout: Sizes of the axes, such as `"dp2-tp2-pp2"`; their product is the number of devices. None: `fsdp` over
            all devices. Or the path of a plan (`plan.yaml`) written by `strategy.plan.to_yaml`, which is used without
            changes; arguments other than their defaults must agree with it.
        schedule: The pipeline schedule: `GPipe`, `1F1B`, `Interleaved1F1B`, `ZBVZeroBubble` or `DualPipeV`.
        microbatches: Number of microbatches of a replica's batch under `pp`; `"auto"` chooses it.
        tensor_plan: Overrides of the inferred tensor plan: patterns of module names to `"colwise"`, `"rowwise"`,
            `"colwise_gather"` or `"replicate"`.
        compile: Compile each block with `torch.compile`.
        recompute: Activation checkpointing: `"full"` recomputes every block in the backward pass; `"selective"` stores
            the outputs of matmuls and attention and recomputes the rest, and the up-projections of latents.
        checkpoints: Options for saving checkpoints and for trusting their content.
        on_nonfinite: Policy if a gradient or the loss is NaN or infinite on any rank, applied by all ranks before the
            update: `"raise"` `NonFiniteError`, or `"skip"` the step.
        gradient_sync: Gradient synchronization: `"exact"`; `"bf16"`, sent and summed in bfloat16; `"bf16_fp32acc"`,
            sent in bfloat16 and summed in float32; `"hierarchical"`, within a node first; `"diloco"`, replicas step
            independently and average their weights every few steps. Or a `GradientSync`.
        verify: Comparison of a training step with one process: `"start"`, before the first update; `"strict"`, which
            also refuses a loss that is no mean over samples; `"every N steps"`; or `"off"`.
        process_group_backend: `"nccl"` or `"gloo"`; None chooses by device.
        timeout: Collective timeout, also for the start. The run then ends with an error that names the missing rank and
            its last operation.

    Raises:
        ValueError: If an argument is not one of its possible values.
    """

    is_distributed = True

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
        verify: str = "start",
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        request = Request(
            layout=Layout(),
            schedule=schedule,
            microbatches=microbatches,
            tensor_plan=renamed_choices(tensor_plan),
            recompute=recompute,
            compile=compile,
            gradient_sync=GradientSync.of(gradient_sync),
            on_nonfinite=on_nonfinite,
        )
        self._layout, self._request = request.in_layout(layout)
        super().__init__()
        self.num_nodes = 1
        self.checkpoints = Checkpoints(checkpoints, timeout)
        self.listeners: list[Listener] = []
        """Listeners to changes of the layout, called in this order."""
        self.sequence_length: int | None = None
        """Length into which samples of training batches are split; None: samples are not split."""
        self._verifier = Verifier(Verify.parse(verify))
        self._world = World(process_group_backend, timeout)
        self._run: Run | None = None
        self._engine: Engine | None = None
        self._failed = False
        self._plans = self._left_out = False

    # ---- parts of the strategy

    @property
    def layout(self) -> Layout:
        """The layout; with none given, `fsdp` over all devices."""
        return self.request.layout

    @property
    def request(self) -> Request:
        """The layout and its options, as currently requested."""
        if self._engine is not None:
            return self._engine.request
        return replace(self._request, layout=self._layout or Layout(fsdp=self.num_nodes * self.num_processes))

    @property
    def engine(self) -> Engine:
        """The engine of the partitioned module, once the strategy has been set up."""
        if self._engine is None and isinstance(self._launcher, NotebookLauncher):
            raise RuntimeError(NOT_IN_NOTEBOOK)
        return _there(self._engine, "engine")

    @property
    def plan(self) -> Plan:
        """The plan of the partitioned module; `plan.to_yaml(path)` writes a file that `layout` accepts."""
        return self.engine.plan

    @property
    def verification(self) -> list[tuple[str, str]]:
        """What the last verification has checked, each with its result; empty if no step was verified."""
        return self._verifier.rows

    @property
    def mesh(self) -> Mesh:
        """The device mesh with this rank's place in the layout, once the processes are connected."""
        return self.data.mesh

    @property
    def data(self) -> ReplicaData:
        """The data of this rank's replica, once the processes are connected."""
        return _there(self._run, "data").data

    @property
    def _module(self) -> pl.LightningModule:
        return _there(self.lightning_module, "lightning_module")

    @property
    def _environment(self) -> ClusterEnvironment:
        return _there(self.cluster_environment, "cluster_environment")

    # ---- processes

    @property
    @override
    def root_device(self) -> torch.device:
        return _there(self.parallel_devices, "root_device")[self.local_rank]

    @property
    @override
    def world_size(self) -> int:
        """Number of ranks; in a step the number of replicas, to which `all_gather` and `reduce` refer.

        After a step without loss 1, since Lightning refuses it with more ranks, which might not agree.
        """
        if self._left_out or self._stands_alone:
            return 1
        return self.mesh.layout.replicas if self._in_step else super().world_size

    @property
    @override
    def global_rank(self) -> int:
        """This rank; in a step the index of its replica."""
        if self._stands_alone:
            return 0
        return self.mesh.replica if self._in_step else super().global_rank

    @property
    @override
    def is_global_zero(self) -> bool:
        return super().global_rank == 0

    @property
    def _in_step(self) -> bool:
        return self._run is not None and self._run.in_step > 0

    @property
    def _stands_alone(self) -> bool:
        return self._run is not None and self._run.gathered_alone is not None

    @property
    def num_processes(self) -> int:
        """Number of processes on this node."""
        return len(self.parallel_devices or ())

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.mesh.layout.replicas, "rank": self.mesh.replica}

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    def barrier(self, name: str | None = None) -> None:
        self._world.barrier(self.root_device)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self._announce("sends an object to the other ranks")
        return self._world.broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Returns `tensor` reduced over the replicas: ranks of `tp` and `pp` hold copies of the same value."""
        if self._stands_alone:
            return tensor
        if group is None and self._run is not None:
            group = self.mesh.replica_group
        self._announce(f"reduces a value over the replicas by {reduce_op!r}")
        return self._world.reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Returns the tensors of all replicas, stacked: ranks of `tp` and `pp` hold copies of the same value."""
        if group is not None and group is not torch.distributed.group.WORLD:
            return super().all_gather(tensor, group, sync_grads)
        if self._run is not None and self._run.gathered_alone is not None:
            return self._run.gathered_alone(tensor)
        group = self.mesh.replica_group if self._engine is None else self._engine.partition.step_group
        return gather_replicas(tensor, group, sync_grads=sync_grads, announce=self._announce)

    def _announce(self, collective: str) -> bool:
        """Announces a collective of the user's code; returns False in a dry run, which must not communicate."""
        if self._plans or self._world.moving:
            return False
        return self._engine is None or self._engine.runner.announce(collective)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self._announce("votes with the other ranks")
        return self._world.vote(decision, self.root_device, all=all)

    # ---- start

    @override
    def _configure_launcher(self) -> None:
        if isinstance(self.precision_plugin, EitherPackage):
            self.precision_plugin.belong_to(self.accelerator)
        ranks = HybridLauncher(self._environment, self.num_processes, self.num_nodes, self.layout, self._world.monitor)
        self._launcher = launcher_here(self, ranks)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._failed = False
        trainer, device = self._module.trainer, self.root_device
        set_ranks(self._environment, self.num_nodes, self.num_processes)
        self._world.connect(self._environment, device, trainer, self.request.arguments())
        self._run = Run(trainer, self._world, self.layout, device, lambda *args: self.engine.runner.padding_step(*args))
        self._run.start()
        self._run.patches.enter_context(self.checkpoints.loggers_follow(trainer, lambda: self._failed))

    @override
    def process_dataloader(self, dataloader: object) -> object:
        return self.data.process(dataloader)

    @override
    def model_sharded_context(self) -> AbstractContextManager:
        return recorded_configure_model(self.lightning_module)

    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> AbstractContextManager:
        return self.precision_plugin.tensor_init_context()  # on the CPU, as in one process

    @override
    def model_to_device(self) -> None:
        """Partitions the module, which moves this rank's part to the device."""
        doing = f"Planning `layout='{self.layout}'`: running the first step without weights"
        with patched(self, _plans=True), told_if_long(doing):
            engine = build_engine(_there(self._run, "engine"), self.request, self._engine)
        engine.start()
        self._use(engine)
        use_local_averages(engine)

    def _use(self, engine: Engine) -> None:
        self._engine = engine
        follow_layout(engine, self.listeners)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self.engine.partition.reshard()
        with self.engine.optimizers.sees_all_parameters(self):
            super().setup_optimizers(trainer)
        self.engine.optimizers.check_optimizers(self.optimizers)

    # ---- steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        runner = self.engine.runner
        runner.rows_per_sample = 1
        if self.sequence_length is not None:
            runner.rows_per_sample = (positions_of(args[0]) or 0) // self.sequence_length
            args = (split_sequences(args[0], self.sequence_length), *args[1:])
        self._announce("has a training batch")
        self._verifier.before_step(self.engine, args, kwargs)
        out = runner.training_step(*args, **kwargs)
        self._left_out = out is None  # on all replicas: `CollectiveOrder` has compared
        return out

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        engine = self.engine
        loss = engine.runner.scaled_for_backward(closure_loss)
        engine.optimizers.nonfinite.saw_loss(loss)
        engine.runner.exchange.saw_loss(closure_loss)
        # hooks are outside of the step, also with manual optimization
        with engine.run.during("backward"), engine.runner.backward(), patched(engine.run, in_step=0):
            loss = super().backward(loss, optimizer, *args, **kwargs)
        engine.runner.gradients.separate()
        engine.runner.gradients_complete()
        return loss

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._verifier.before_logging_step(self.engine, "validation_step", args)
        return self.engine.runner.evaluate("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._verifier.before_logging_step(self.engine, "test_step", args)
        return self.engine.runner.evaluate("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine.runner.predict(*args, **kwargs)

    def on_train_start(self) -> None:
        """Logs the bytes sent per step for gradients, if gradient synchronization is not exact."""
        self.engine.runner.gradients.log_sent_bytes(self._module.trainer)

    def on_train_end(self) -> None:
        """Synchronizes the weights of replicas that step independently (DiLoCo)."""
        self._announce("ends the training")
        self._verifier.after_epoch(self.engine, "training_step")
        if self.engine.diloco is not None:
            self.engine.diloco.agree()

    def on_validation_end(self) -> None:
        """Checks what the validation has logged."""
        self._verifier.after_epoch(self.engine, "validation_step")

    def on_test_end(self) -> None:
        """Checks what the test has logged."""
        self._verifier.after_epoch(self.engine, "test_step")

    def on_predict_start(self) -> None:
        """Refuses loaders for which predictions would not be complete."""
        self.data.check_predictions()

    def on_predict_end(self) -> None:
        """Gives every rank all predictions."""
        self.data.finish_predictions()

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with self.engine.runner.gradients.local_only():
            yield
        self._left_out = False

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        try:
            with self.engine.outside_hooks(), patched(self.engine.run, in_step=0):
                return self.engine.optimizers.step(super().optimizer_step, optimizer, closure, model, **kwargs)
        finally:
            self._left_out = False

    # ---- state

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns this rank's parts; `full_state_dict` returns whole weights."""
        if self._world.unsavable:
            return {}
        with self.engine.divided():
            return state.state_dict(self.engine)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._world.unsavable:
            return {}
        with self.engine.divided():
            return state.optimizer_state(self.engine, optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self._world.unsavable:
            self._world.monitor.note_unsaved(filepath)
        else:
            self._announce("saves a checkpoint")
            with self.engine.divided():
                self.checkpoints.save(self.engine, {**checkpoint, "verified": self._verifier.state_dict()}, filepath)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        self.checkpoints.saver.remove(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = self.checkpoints.load(self.engine, checkpoint_path, trust_pickle=weights_only is False)
        self._verifier.load_state_dict(checkpoint.pop("verified", None) or {})
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state.load_state_dict(self.engine, checkpoint["state_dict"], strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self.checkpoints.load_optimizers(self.engine, self.optimizers, checkpoint["optimizer_states"])

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        self.checkpoints.first_batch(self._module.trainer)
        return super().batch_to_device(batch, device, dataloader_idx)

    # ---- for users and callbacks, during training

    def gradient_norms(self) -> dict[str, Tensor]:
        """Returns the values of Lightning's `grad_norm(module, 2)`, of the parts of all ranks. Collective."""
        with self.engine.divided():
            return gradient_norms(self.engine.partition, self.engine.device)

    def expert_loads(self) -> dict[str, Tensor]:
        """Returns the tokens that each expert received in training since the last call, on all ranks. Collective.

        Returns:
            Counts of shape `(experts,)`, by name of the module of experts, for modules that `ep` divides.
        """
        return self.engine.expert_loads()

    def full_state_dict(self) -> dict[str, Tensor]:
        """Returns all whole weights and buffers by name, on the CPU of rank 0; `{}` on other ranks. Collective."""
        with self.engine.divided():
            return state.full_state_dict(self.engine)

    @contextmanager
    def whole(self, module: torch.nn.Module | None = None) -> Iterator[Any]:
        """Shows the module as the user wrote it, with whole weights on every rank. Collective over all ranks.

        Within the context the module can be called, copied and saved (`state_dict`, `generate`, `save_pretrained`), on
        any rank; changes of its weights are kept. It may be entered after a run, and in hooks that all ranks run
        between two steps of the optimizer. Each rank needs memory for the whole weights.

        Args:
            module: The LightningModule of this strategy, which is yielded; None: that one.

        Raises:
            PartitionError: If parameters were added, removed or replaced within the context.
            ValueError: If `module` is another module.
        """
        root = self.engine.root
        if module is not None and module is not root:
            raise ValueError(
                f"`module` must be the LightningModule that the Trainer ran, a {type(root).__name__}. Got "
                f"{type(module).__name__}."
            )
        with self.engine.shown_whole():
            yield root

    def relayout(
        self, layout: str | Layout, *, edit: Callable[[], None] | None = None, **options: Unpack[LayoutOptions]
    ) -> RelayoutResult:
        """Changes the layout during training: the same module, optimizers, schedulers, loggers and data.

        Must be called between two steps of the optimizer, in a hook that all ranks run (`on_train_batch_end`,
        `on_train_epoch_start`). Weights, optimizer state and buffers move by name; a rank receives only missing
        elements. The global batch stays the same, so the result stays the same, too. Collective over all ranks.

        Args:
            layout: Another layout of the same ranks.
            edit: Adds modules with new weights to the LightningModule, on all ranks alike, while weights move. The
                optimizers get the new weights in the groups in which `configure_optimizers` puts them.
            **options: Options that belong to a layout, see `LayoutOptions`.

        Returns:
            The bytes sent and the seconds passed.

        Raises:
            PartitionError: On all ranks, if the change is refused or fails; training is in the old layout then.
        """
        wanted = self.request.changed(layout, **options)
        with self.engine.outside_hooks():
            return relayout(self.engine, wanted, self.optimizers, self.listeners, self._use, edit)

    # ---- end

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        self.checkpoints.abandon()

    @override
    def teardown(self) -> None:
        self.checkpoints.wait()
        if self._engine is not None:
            self._engine.stop()
            self._engine.end_run(failed=self._failed or self._world.monitor.failing)
        if self._run is not None:
            self._run.patches.close()
        self.listeners.clear()
        self.sequence_length = None
        self._environment.teardown()
        self.precision_plugin.teardown()
        _there(self.accelerator, "accelerator").teardown()
        self.checkpoint_io.teardown()
        self._world.monitor.torn_down()


def _there(value: T | None, name: str) -> T:
    if value is None:
        raise RuntimeError(f"`strategy.{name}` is available only while a Trainer runs, after set-up.")
    return value


accept_strategy(HybridStrategy)
name_the_remedy()
warn_if_untested()
