"""A strategy whose module is partitioned, and what users and callbacks ask of it while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Literal

from torch import Tensor

from lightning_hybrid._lightning_private import running_batch
from lightning_hybrid._torch_private import limit_waiting
from lightning_hybrid.checkpoint import state
from lightning_hybrid.compat.averaging import follow_copies
from lightning_hybrid.compat.callbacks import follow_callbacks
from lightning_hybrid.connected import ConnectedStrategy
from lightning_hybrid.dataloader.replica import ReplicaData
from lightning_hybrid.engine.norms import gradient_norms
from lightning_hybrid.engine.optimizer import OptimizerWrapper
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.launch.monitor import FailureMonitor
from lightning_hybrid.launch.preemption import Preemption
from lightning_hybrid.launch.processes import DEFAULT_TIMEOUT
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.loggers import log_sent_bytes
from lightning_hybrid.replicas.reducer import seen_after_backward
from lightning_hybrid.reshard.relayout import Moved, Relayout
from lightning_hybrid.spec.gradient_sync import GradientSync
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.plan import Plan
from lightning_hybrid.spec.request import Request
from lightning_hybrid.tuning.batch_size import BatchSizeController, BatchSizePolicy

Schedule = Literal["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"]


class PartitionedStrategy(ConnectedStrategy):
    """The partitioned module, its layout, and how both change while training goes on.

    Args:
        process_group_backend: See `ConnectedStrategy`.
        watch: See `ConnectedStrategy`.
        layout: The layout that the user has given; None: `fsdp` over all devices.
        request: What belongs to the layout.
        on_nonfinite: See `NonFiniteCheck`.
        timeout: How long one rank waits for another.
    """

    def __init__(
        self,
        process_group_backend: str | None,
        watch: FailureMonitor,
        layout: Layout | None,
        request: Request,
        on_nonfinite: Literal["raise", "skip"],
        timeout: timedelta | None,
    ) -> None:
        super().__init__(process_group_backend, watch)
        self._layout, self._request = layout, request
        self._on_nonfinite: Literal["raise", "skip"] = on_nonfinite
        self._timeout = timeout
        self._runner: StepRunner | None = None
        self._steps: OptimizerWrapper | None = None
        self._data: ReplicaData | None = None
        self._preemption = Preemption(lambda wanted: self.reduce_boolean_decision(wanted, all=False))
        self.sequence_length: int | None = None
        """Samples of training batches are split into samples of this length; None: they are whole."""
        self.batch_size_controllers: list[BatchSizeController] = []
        """Those that callbacks hold at present."""
        self.moving = False
        """Whether weights are on their way to another layout; nothing can be saved then."""

    @property
    def layout(self) -> Layout:
        """The layout; with none given, `fsdp` over all devices."""
        return self._layout or Layout(fsdp=self.num_nodes * self.num_processes)

    @property
    def request(self) -> Request:
        """The layout and what belongs to it, as they are asked for at present."""
        return replace(self._request, layout=self.layout)

    @property
    def runner(self) -> StepRunner:
        """The partitioned module, once it is set up."""
        if self._runner is None:
            raise RuntimeError("`strategy.runner` is there only after the strategy has been set up (Trainer.fit).")
        return self._runner

    @property
    def steps(self) -> OptimizerWrapper:
        """What surrounds optimizer steps, once it is set up."""
        if self._steps is None:
            raise RuntimeError("`strategy.steps` is there only after the strategy has been set up (Trainer.fit).")
        return self._steps

    @property
    def data(self) -> ReplicaData:
        """The data of this rank's replica, once the processes are connected."""
        if self._data is None:
            raise RuntimeError("`strategy.data` is there only after the processes have been connected (Trainer.fit).")
        return self._data

    def _during(self, operation: str) -> AbstractContextManager:
        trainer = self._module.trainer
        return self._watch.during(operation, running_batch(trainer), trainer.global_step)

    # ---- what it shows

    @property
    def plan(self) -> Plan:
        """The plan of the partitioned module; `plan.to_yaml(path)` writes a file that `layout` takes."""
        return self.runner.partition.plan

    def gradient_norms(self) -> dict[str, Tensor]:
        """What `lightning.pytorch.utilities.grad_norm(module, 2)` gives in one process. Collective.

        That function itself sees this rank's parts only. In `on_before_optimizer_step`:
        `self.log_dict(self.trainer.strategy.gradient_norms())`.
        """
        return gradient_norms(self.runner.partition, self.runner.device)

    def control_batches(self, policy: BatchSizePolicy | None = None) -> BatchSizeController:
        """For callbacks that change the batch size while training goes on, from `on_train_start` on.

        Args:
            policy: Says how batches are divided where the layout changes.
        """
        control = BatchSizeController(self._module.trainer, self, policy)
        self.batch_size_controllers.append(control)
        return control

    def expert_loads(self) -> dict[str, Tensor]:
        """Tokens that went to each expert in training since the last call, on all ranks. Collective.

        Returns:
            By name of the module of experts, of those that `ep` divides: counts of shape `(experts,)`.
        """
        return self.runner.expert_loads()

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights and buffers under their original names, on the CPU of rank 0; `{}` on other ranks. Collective."""
        return state.full_state_dict(self.runner)

    # ---- another layout

    def relayout(
        self,
        layout: str | Layout,
        *,
        schedule: Schedule | None = None,
        microbatches: int | Literal["auto"] | None = None,
        gradient_sync: str | GradientSync | None = None,
        cuts: Sequence[int] | None = None,
        expert_orders: Mapping[str, Sequence[int]] | None = None,
        expert_hosts: Mapping[str, Sequence[Sequence[int]]] | None = None,
        edit: Callable[[], None] | None = None,
    ) -> Moved:
        """Changes the layout while training goes on: the same module, optimizers, schedulers, loggers and data.

        Between two steps of the optimizer, in a hook that all ranks run (`on_train_batch_end`, `on_train_epoch_start`).
        Weights, optimizer state and buffers move by name, and only what a rank lacks is sent. The global batch stays,
        so training goes on as it would have in the old layout. Collective over all ranks.

        Args:
            layout: Another layout of the same ranks.
            schedule: The pipeline schedule from now on; None: as before.
            microbatches: The microbatches from now on; None: as before.
            gradient_sync: How replicas agree on gradients from now on; None: as before.
            cuts: Where pipeline stages begin, by number of the call in `runner.partition.plan`; None: by FLOPs.
            expert_orders: By name of a module of experts, which expert stands at each place over the ranks of `ep`;
                None: in their own order.
            expert_hosts: By name of a module of experts, for each rank of `ep` the experts that it computes; those of
                several ranks share their tokens. Weights that a rank does not have are sent to it in every forward
                pass, and their gradients back. None: each rank computes those that it has.
            edit: Adds modules with new weights to the LightningModule, on all ranks alike; called while the weights
                are on their way. The optimizers take the new ones into the groups that `configure_optimizers` would.

        Returns:
            What was moved.

        Raises:
            PartitionError: On all ranks, if it cannot be; training is in the old layout then.
        """
        present = self._request
        wanted = replace(
            present,
            layout=Layout.parse(layout) if isinstance(layout, str) else layout,
            plan=None,
            schedule=schedule or present.schedule,
            microbatches=microbatches or present.microbatches,
            gradient_sync=present.gradient_sync if gradient_sync is None else GradientSync.of(gradient_sync),
            cuts=None if cuts is None else tuple(cuts),
            expert_orders={name: tuple(order) for name, order in (expert_orders or {}).items()},
            expert_hosts={name: tuple(map(tuple, hosts)) for name, hosts in (expert_hosts or {}).items()},
        )
        with self._during("relayout"):
            return Relayout(self, wanted, edit).run()

    def take_layout(self, request: Request, mesh: Mesh, runner: StepRunner) -> None:
        """For `Relayout`: everything of this strategy goes on with the module as it is partitioned now."""
        trainer, factor = self._module.trainer, self.steps.learning_rate_factor
        stays = request.layout == self.layout
        firsts = [None if stays else control.first_under(request) for control in self.batch_size_controllers]
        self._layout, self._request = request.layout, request
        self._mesh, self._runner = mesh, runner
        runner.root.__dict__["_hybrid_partition"] = runner.partition
        limit_waiting(self._timeout or DEFAULT_TIMEOUT)  # of the groups that the partition has made
        runner.install_logs()
        follow_copies(runner)
        follow_callbacks(trainer, runner)
        runner.gradients_are_seen = self.reduce_boolean_decision(seen_after_backward(trainer), all=False)
        self._steps = OptimizerWrapper(runner, self.precision_plugin, self._on_nonfinite, self._preemption)
        self._steps.learning_rate_factor = factor
        self._steps.install()
        self.data.follow_layout(mesh)
        for control, first in zip(self.batch_size_controllers, firsts, strict=True):
            control.follow(first)
        self._log_sent_bytes()

    def _log_sent_bytes(self) -> None:
        if self._request.gradient_sync.kind != "exact":
            log_sent_bytes(self._module.trainer, self.runner.sent_bytes)
