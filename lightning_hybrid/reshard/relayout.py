"""One change of layout, between two steps of the optimizer: the same module and optimizers, divided anew.

The protocol. Every phase is entered by all ranks or by none.

1. check: what is asked for is possible and the same on all ranks. An error changes nothing.
2. take out: each rank refers to its own parts by name; the module is left with ghosts.
3. plan: the module is run on ghosts as at the start. If that fails on any rank, the old layout is put on again, from
   parts that have not moved, and all ranks raise the error: training could go on.
4. move: memory for the new parts, and what a rank lacks comes from the ranks that have it.
5. follow: optimizers, data, logs, metrics, averages.

An error in phases 4 and 5 ends the run on all ranks, as any error does; nothing is saved between 2 and the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_hybrid._lightning_private import between_steps
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.compat.averaging import LocalWeights, local_averages, renew_averages
from lightning_hybrid.engine import start
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.ghosts.deferred_init import EmptyInit
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.plan import check_trainer, make_partition
from lightning_hybrid.reshard.exchange import exchange
from lightning_hybrid.reshard.local_state import LocalState, Target, places_of, share_whole
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.request import Request

if TYPE_CHECKING:
    from lightning_hybrid.partitioned import PartitionedStrategy


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a change of layout was."""

    before: Layout
    after: Layout
    sent_bytes: int
    """Of weights, optimizer state and buffers that went from one rank to another, of all ranks together."""
    seconds: float
    """From the call to the end, on this rank."""


class Relayout:
    """Changes the layout of a running fit.

    Args:
        strategy: The strategy.
        request: The new layout and what belongs to it.
        edit: Adds new weights to the module, or None.
    """

    def __init__(
        self,
        strategy: PartitionedStrategy,
        request: Request,
        edit: Callable[[], None] | None = None,
    ) -> None:
        self._strategy, self._request, self._edit = strategy, request, edit
        self._trainer: pl.Trainer = strategy.runner.root.trainer
        self._old = strategy.runner

    def run(self) -> Moved:
        """Does it. Collective over all ranks.

        Raises:
            PartitionError: On all ranks, if it cannot be; training is in the old layout then.
        """
        began, before = time.perf_counter(), self._strategy.layout
        self._check()
        mesh = Mesh.create(self._request.layout, self._strategy.root_device.type)
        self._strategy.data.check_layout(mesh)
        share_whole(self._old.partition)
        if self._old.diloco is not None:
            self._old.diloco.agree()
        old_averages = local_averages(self._trainer)
        metrics = self._old.metrics.states_of_all()
        local_state = LocalState.of(self._old, self._strategy.optimizers, old_averages)
        found = places_of(self._old.partition, local_state)
        self._strategy.moving = True
        self._take_off(local_state)
        if self._edit is not None:
            self._edit()
        partition, problem = self._plan(mesh)
        partition.apply(self._strategy.root_device, EmptyInit(self._strategy.root_device))
        share_whole(partition)
        runner = StepRunner(
            self._old.root, partition, self._strategy.root_device, self._old.precision, self._request.microbatches
        )
        runner.streams.load_state_dict(self._old.streams.state_dict())
        averages = [LocalWeights(runner.root, partition) for _ in old_averages]
        target = Target(runner, self._strategy.optimizers, averages, local_state)
        target.renew_optimizers()
        sent = exchange(local_state.parts, local_state.dtypes, found, places_of(partition, local_state), target.tensor)
        if runner.diloco is not None:
            runner.diloco.begin()
        self._strategy.take_layout(self._request, partition.mesh, runner)
        renew_averages(self._trainer, averages)
        runner.metrics.load_states(metrics)
        self._agree(None)
        self._strategy.moving = False
        if problem is not None:
            raise PartitionError(f"{problem} Training is in `layout='{before}'` as before.")
        moved = Moved(before=before, after=self._request.layout, sent_bytes=sent, seconds=time.perf_counter() - began)
        rank_zero_info(f"{moved.before} -> {moved.after}: {sent / 2**20:.1f} MiB sent in {moved.seconds:.2f} s.")
        return moved

    # ---- phase 1

    def _check(self) -> None:
        told = gather_objects((self._problem(), str(self._request), self._trainer.global_step))
        for rank, (found, *_) in enumerate(told):
            if found is not None:
                raise PartitionError(found if len({t[0] for t in told}) == 1 else f"Rank {rank}: {found}")
        for rank, (_, *wanted) in enumerate(told):
            if wanted != list(told[0][1:]):
                raise PartitionError(
                    f"`relayout` must be called alike on all ranks. Rank 0 asks for {told[0][1]} at global step "
                    f"{told[0][2]}, rank {rank} for {wanted[0]} at global step {wanted[1]}."
                )

    def _problem(self) -> str | None:
        """Why it cannot be, as far as one rank knows."""
        trainer, root, layout = self._trainer, self._old.root, self._request.layout
        if trainer.state.fn != TrainerFn.FITTING or not trainer.training:
            return "`relayout` changes the layout of training: call it in a hook while `Trainer.fit` trains."
        if not root.automatic_optimization:
            return (
                f"`relayout` needs to know when a step has been made, but {type(root).__name__} optimizes manually "
                "(`automatic_optimization = False`)."
            )
        if not between_steps(trainer):
            return (
                "`relayout` must be called between two steps of the optimizer: in `on_train_batch_end` after the last "
                f"of `accumulate_grad_batches={trainer.accumulate_grad_batches}` batches, or in `on_train_epoch_start`."
            )
        if (metric := self._old.metrics.unmovable(layout)) is not None:
            return (
                f"`relayout` cannot divide what the metric `{metric}` has seen in this epoch among replicas: one of "
                "its states has a reduction of its own. Change the layout in `on_train_epoch_start`."
            )
        try:
            layout.validate(dist.get_world_size())
            self._request.gradient_sync.check(layout)
            check_trainer(layout, trainer)
            self._strategy.steps.check_optimizers(self._strategy.optimizers, layout)
            for control in self._strategy.batch_size_controllers:
                control.check_layout(self._request)
        except (ValueError, PartitionError) as error:
            return str(error)
        return None

    # ---- phase 2

    def _take_off(self, local_state: LocalState) -> None:
        self._strategy.steps.remove()
        self._old.remove_logs()
        for parameter in self._old.partition.parameters.local().values():
            parameter.grad = None
        parameters = self._old.partition.parameters.names
        shapes = {name: local_state.shapes[name] for name in parameters}
        self._old.partition.take_off(shapes, self._strategy.root_device)

    # ---- phase 3

    def _plan(self, mesh: Mesh) -> tuple[Partition, str | None]:
        """The new partition; or the old one again, and why."""
        old = self._strategy.request
        made, problem = None, None
        try:
            made = self._make(self._request, mesh)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the old layout is put on again
            problem = str(error) if isinstance(error, PartitionError) else f"{type(error).__name__}: {error}"
        problem = self._agree(problem)
        if made is not None and problem is None:
            return made, None
        if made is not None:
            made.interceptor.remove()
        self._request = old
        return self._make(old, self._old.mesh), problem

    def _make(self, request: Request, mesh: Mesh) -> Partition:
        root, device = self._old.root, self._strategy.root_device
        size = self._strategy.data.batch_size_under(mesh)
        context = self._old.precision.forward_context

        def sample() -> tuple[str, tuple]:
            return start.sample_of_training(self._trainer, size)

        return make_partition(root, request, mesh, device, context, sample)

    def _agree(self, problem: str | None) -> str | None:
        """The first rank's problem, on all ranks. Collective."""
        return next((p for p in gather_objects(problem) if p is not None), None)
