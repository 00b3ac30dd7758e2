"""One change of layout, between two steps of the optimizer: the same module and optimizers under another layout.

The protocol. All ranks enter each phase, or none does.

1. check: the request is possible and the same on all ranks. An error changes nothing.
2. take off: each rank refers to its own parts by name; the module is left with ghosts.
3. edit and plan: the user's `edit` adds modules; the module is run on ghosts as at the start.
4. apply and move: memory for the new parts; parts that a rank lacks come from the ranks that have them.
5. follow: patches, metrics and averages of the new engine.

Old parts stay in memory until phase 5 is over, so an error of any rank in phases 3 to 5 puts the old layout on again,
and the module is as it was, without the modules that `edit` has added. A rank that ends, or a collective that breaks,
ends the run on all ranks; nothing is saved between phases 2 and 5.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_hybrid._lightning_private import between_steps
from lightning_hybrid.collectives import error_message, gather_objects, on_all_ranks
from lightning_hybrid.compat.averaging import LocalWeights, local_averages, renew_averages
from lightning_hybrid.dataloader.replica import ReplicaData
from lightning_hybrid.engine.build import belong_to
from lightning_hybrid.engine.engine import Engine, Listener
from lightning_hybrid.engine.first_batch import training_step_like
from lightning_hybrid.ghosts.deferred_init import EmptyInit
from lightning_hybrid.ghosts.preserve import SavedObjects
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.plan import check_trainer
from lightning_hybrid.reshard.exchange import exchange
from lightning_hybrid.reshard.local_state import LocalState, Target, places_of, share_whole
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.request import Request


@dataclass(frozen=True, kw_only=True)
class RelayoutResult:
    """One change of layout."""

    before: Layout
    after: Layout
    sent_bytes: int
    """Of weights, optimizer state and buffers that went from one rank to another, of all ranks together."""
    seconds: float
    """From the call to the end, on this rank."""
    problem: str | None = None
    """The reason why the layout is still `before`; None if it has changed."""


def relayout(
    engine: Engine,
    request: Request,
    data: ReplicaData,
    optimizers: Sequence[Optimizer],
    listeners: Sequence[Listener],
    edit: Callable[[], None] | None = None,
) -> tuple[Engine, RelayoutResult]:
    """Changes the layout of a running fit. Collective over all ranks.

    Args:
        engine: The engine of the present layout; it cannot be used afterwards.
        request: The new layout and the options that belong to it.
        data: The data of this rank's replica, which must be able to follow.
        optimizers: The optimizers; they keep their identity.
        listeners: Asked whether they can follow.
        edit: Adds modules with new weights to the module, or None.

    Returns:
        The started engine that is in force now, and the result: if it has a `problem`, the layout is the old one.

    Raises:
        PartitionError: On all ranks, if the request is refused before anything has changed.
    """
    began, before = time.perf_counter(), engine.request.layout
    _check(engine, request, optimizers, listeners)
    mesh = Mesh.create(request.layout, engine.device.type)
    data.check_layout(mesh)
    share_whole(engine.partition)
    if engine.diloco is not None:
        engine.diloco.agree()
    move = _Move(engine, optimizers)
    move.take_off()
    size = data.batch_size_under(mesh)
    problem, sent = None, 0
    modules = SavedObjects(engine.root.modules())
    try:
        if edit is not None:
            on_all_ranks(edit)
        new, sent = move.build(request, mesh, size)
    except Exception as error:  # noqa: BLE001 -- whatever it is, the old layout is put on again
        problem = error_message(error)
        move.abandon()
        modules.restore()
        new, _ = move.build(engine.request, engine.mesh, data.batch_size_under(engine.mesh))
    belong_to(new)
    result = RelayoutResult(
        before=before,
        after=new.request.layout,
        sent_bytes=sent,
        seconds=time.perf_counter() - began,
        problem=None if problem is None else f"{problem} Training is in `layout='{before}'` as before.",
    )
    if problem is None:
        rank_zero_info(f"{before} -> {result.after}: {sent / 2**20:.1f} MiB sent in {result.seconds:.2f} s.")
    return new, result


class _Move:
    """The state of a module and its optimizers, taken out of one engine and put into another."""

    def __init__(self, old: Engine, optimizers: Sequence[Optimizer]) -> None:
        self._old, self._optimizers = old, optimizers
        self._averages = local_averages(old.run.trainer)
        self._metrics = old.metrics.states_of_all()
        self._local_state = LocalState.of(old, optimizers, self._averages)
        self._found = places_of(old.partition, self._local_state)
        self._names = self._local_state.names
        self._partition: Partition | None = None
        self._engine: Engine | None = None

    def take_off(self) -> None:
        """Leaves the module with ghosts, and takes the patches of the old engine off."""
        old, partition = self._old, self._old.partition
        old.stop()
        for parameter in partition.parameters.local().values():
            parameter.grad = None
        partition.take_off({n: self._local_state.shapes[n] for n in partition.parameters.names}, old.device)

    def build(self, request: Request, mesh: Mesh, batch_size: int | None) -> tuple[Engine, int]:
        """Builds and starts an engine with the state that was taken out.

        Args:
            request: The layout and the options that belong to it.
            mesh: Its mesh.
            batch_size: Samples of a replica's batch; None: as the loader gives them.

        Returns:
            The engine, and the bytes that were sent, of all ranks together.
        """
        run, device = self._old.run, self._old.device
        self._local_state.names = [[list(members) for members in groups] for groups in self._names]

        def plan() -> Partition:
            self._partition = Engine.plan_partition(
                run, request, mesh, lambda: training_step_like(run.trainer, batch_size)
            )
            return self._partition

        partition = on_all_ranks(plan)
        engine = on_all_ranks(lambda: Engine.build(run, request, partition, EmptyInit(device)))
        self._engine = engine
        share_whole(partition)
        engine.rng.load_state_dict(self._old.rng.state_dict())
        engine.optimizers.learning_rate_factor = self._old.optimizers.learning_rate_factor
        averages = [LocalWeights(engine.root, partition) for _ in self._averages]
        target = Target(engine, self._optimizers, averages, self._local_state)
        on_all_ranks(target.renew_optimizers)
        parts, dtypes = dict(self._local_state.parts), self._local_state.dtypes
        sent = exchange(parts, dtypes, self._found, places_of(partition, self._local_state), target.tensor)
        if engine.diloco is not None:
            engine.diloco.begin()
        on_all_ranks(engine.start)
        engine.metrics.load_states(self._metrics)
        renew_averages(run.trainer, averages)
        return engine, sent

    def abandon(self) -> None:
        """Takes off what an unfinished `build` has put on, as far as it came."""
        if self._engine is not None:
            self._engine.stop()
            self._engine.runner.gradients.release()
        if self._partition is not None:
            self._partition.abandon()
        self._engine = self._partition = None


def _check(engine: Engine, request: Request, optimizers: Sequence[Optimizer], listeners: Sequence[Listener]) -> None:
    """Refuses what cannot be, or is not the same on all ranks. Collective."""
    own = _problem(engine, request, optimizers, listeners)
    told = gather_objects((own, str(request), engine.run.trainer.global_step))
    for rank, (found, *_) in enumerate(told):
        if found is not None:
            raise PartitionError(found if len({t[0] for t in told}) == 1 else f"Rank {rank}: {found}")
    for rank, (_, *wanted) in enumerate(told):
        if wanted != list(told[0][1:]):
            raise PartitionError(
                f"`relayout` must be called alike on all ranks. Rank 0 asks for {told[0][1]} at global step "
                f"{told[0][2]}, rank {rank} for {wanted[0]} at global step {wanted[1]}."
            )


def _problem(
    engine: Engine, request: Request, optimizers: Sequence[Optimizer], listeners: Sequence[Listener]
) -> str | None:
    """Returns the reason why the request is refused, as far as this rank knows; None if it is not."""
    trainer, root, layout = engine.run.trainer, engine.root, request.layout
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
    if (metric := engine.metrics.unmovable(layout)) is not None:
        return (
            f"`relayout` cannot divide what the metric `{metric}` has seen in this epoch among replicas: one of "
            "its states has a reduction of its own. Change the layout in `on_train_epoch_start`."
        )
    try:
        layout.validate(dist.get_world_size())
        request.gradient_sync.check(layout)
        check_trainer(layout, trainer)
        engine.optimizers.check_optimizers(optimizers, layout)
        for listener in listeners:
            listener.check_layout(request)
    except (ValueError, PartitionError) as error:
        return str(error)
    return None
