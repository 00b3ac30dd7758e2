"""Changes the layout between two steps of the optimizer: the same module and optimizers under another layout.

All ranks enter each of these phases, or none does:

1. check: the request is possible and the same on all ranks. An error changes nothing.
2. detach: each rank keeps references to its own parts by name; ghosts replace the module's parameters.
3. edit and plan: the user's `edit` adds modules; the module is traced on ghosts as at the start.
4. apply and move: memory for the new parts is allocated; ranks receive missing parts from the ranks that hold them.
5. follow: patches, metrics and averages are moved to the new engine.

Old parts stay in memory until phase 5 is over. An error of any rank in phases 3 to 5 restores the old layout and the
module, without the modules that `edit` has added. A rank that ends, or a collective that fails, ends the run on all
ranks; no checkpoint is saved between phases 2 and 5.
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
from lightning_hybrid.compat.averaging import (
    LocalWeights,
    keep_loading_whole_weights,
    local_averages,
    local_copies,
    renew_averages,
)
from lightning_hybrid.compat.callbacks import patched_callbacks
from lightning_hybrid.compat.hooks import patched_hooks
from lightning_hybrid.engine.build import belong_to
from lightning_hybrid.engine.engine import Engine, Listener
from lightning_hybrid.engine.first_batch import training_step_like
from lightning_hybrid.ghosts.deferred_init import EmptyInit
from lightning_hybrid.ghosts.preserve import SavedObjects
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.plan import check_trainer
from lightning_hybrid.patching import patched
from lightning_hybrid.reshard.exchange import exchange
from lightning_hybrid.reshard.local_state import LocalState, Target, places_of, share_whole
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.request import Request


@dataclass(frozen=True, kw_only=True)
class RelayoutResult:
    """Result of one change of layout."""

    before: Layout
    after: Layout
    sent_bytes: int
    """Bytes of weights, optimizer state and buffers sent to another rank, by all ranks together."""
    seconds: float
    """Seconds from the call to the end, on this rank."""


def relayout(
    engine: Engine,
    request: Request,
    optimizers: Sequence[Optimizer],
    listeners: Sequence[Listener],
    use: Callable[[Engine], None],
    edit: Callable[[], None] | None = None,
) -> RelayoutResult:
    """Changes the layout of a running fit. Collective over all ranks.

    Args:
        engine: The engine of the current layout, which cannot be used afterwards.
        request: The new layout and its options.
        optimizers: The optimizers, which keep their identity.
        listeners: Listeners, each of which may refuse the new layout.
        use: Makes the started engine that it is given the current one.
        edit: Adds modules with new weights to the module, or None.

    Returns:
        The layouts, the bytes sent and the seconds passed.

    Raises:
        PartitionError: On all ranks, if the request is refused or fails; training is in the old layout then.
    """
    began, before = time.perf_counter(), engine.request.layout
    with engine.run.told("relayout", "Moving weights to another layout"), patched(engine.run.world, moving=True):
        new, sent, problem = _change(engine, request, optimizers, listeners, edit)
        use(new)
    if problem is not None:
        raise PartitionError(f"{problem} Training is in `layout='{before}'` as before.")
    seconds = time.perf_counter() - began
    rank_zero_info(f"{before} -> {request.layout}: {sent / 2**20:.1f} MiB sent in {seconds:.2f} s.")
    new.runner.gradients.log_sent_bytes(new.run.trainer)
    return RelayoutResult(before=before, after=request.layout, sent_bytes=sent, seconds=seconds)


def follow_layout(engine: Engine, listeners: Sequence[Listener]) -> None:
    """Updates everything else that depends on the layout of a started engine, in order."""
    engine.run.world.limit_waiting()  # of the groups that the engine has created
    keep_loading_whole_weights(engine)
    engine.patches.enter_context(local_copies(engine))
    engine.patches.enter_context(patched_callbacks(engine))
    engine.patches.enter_context(patched_hooks(engine))
    engine.run.data.follow_layout(engine.mesh)
    for listener in listeners:
        listener.layout_changed(engine)


def _change(
    engine: Engine,
    request: Request,
    optimizers: Sequence[Optimizer],
    listeners: Sequence[Listener],
    edit: Callable[[], None] | None,
) -> tuple[Engine, int, str | None]:
    """Returns a started engine, the bytes sent, and None, or the reason why the engine is of the old layout."""
    _check(engine, request, optimizers, listeners)
    mesh, data = Mesh.create(request.layout, engine.device.type), engine.run.data
    data.check_layout(mesh)
    share_whole(engine.partition)
    if engine.diloco is not None:
        engine.diloco.agree()
    move = _Move(engine, optimizers)
    move.detach()
    size = data.batch_size_under(mesh)
    problem, sent = None, 0
    modules = SavedObjects(engine.root.modules())
    try:
        if edit is not None:
            on_all_ranks(edit)
        new, sent = move.build(request, mesh, size)
    except Exception as error:  # noqa: BLE001 -- after any error the old layout is restored
        problem = error_message(error)
        move.abandon()
        modules.restore()
        new, _ = move.build(engine.request, engine.mesh, data.batch_size_under(engine.mesh))
    belong_to(new)
    return new, sent, problem


class _Move:
    """Moves the state of a module and its optimizers from one engine to another."""

    def __init__(self, old: Engine, optimizers: Sequence[Optimizer]) -> None:
        self._old, self._optimizers = old, optimizers
        self._averages = local_averages(old.run.trainer)
        self._metrics = old.metrics.states_of_all()
        self._local_state = LocalState.of(old, optimizers, self._averages)
        self._found = places_of(old.partition, self._local_state)
        self._names = self._local_state.names
        self._partition: Partition | None = None
        self._engine: Engine | None = None

    def detach(self) -> None:
        """Replaces the module's parameters by ghosts, and removes the patches of the old engine."""
        old, partition = self._old, self._old.partition
        old.stop()
        for parameter in partition.parameters.local().values():
            parameter.grad = None
        partition.detach({n: self._local_state.shapes[n] for n in partition.parameters.names}, old.device)

    def build(self, request: Request, mesh: Mesh, batch_size: int | None) -> tuple[Engine, int]:
        """Builds and starts an engine with the state of the old engine.

        Args:
            request: The layout and its options.
            mesh: The mesh of the layout.
            batch_size: Number of samples of a replica's batch; None: that of the loader's batch.

        Returns:
            The engine, and the bytes sent by all ranks together.
        """
        run, device = self._old.run, self._old.device
        self._local_state.names = [[list(members) for members in groups] for groups in self._names]

        def plan() -> Partition:
            self._partition = Engine.plan_partition(
                run, request, mesh, lambda share: training_step_like(run.trainer, batch_size, share)
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
        """Undoes the part of an unfinished `build` that was applied."""
        if self._engine is not None:
            self._engine.stop()
            self._engine.runner.gradients.release()
        if self._partition is not None:
            self._partition.abandon()
        self._engine = self._partition = None


def _check(engine: Engine, request: Request, optimizers: Sequence[Optimizer], listeners: Sequence[Listener]) -> None:
    """Refuses a request that is not possible, or not the same on all ranks. Collective.

    Raises:
        PartitionError: On all ranks, with the reason.
    """
    own = _problem(engine, request, optimizers, listeners)
    requests = gather_objects((own, str(request), engine.run.trainer.global_step))
    for rank, (found, *_) in enumerate(requests):
        if found is not None:
            raise PartitionError(found if len({r[0] for r in requests}) == 1 else f"Rank {rank}: {found}")
    for rank, (_, *wanted) in enumerate(requests):
        if wanted != list(requests[0][1:]):
            raise PartitionError(
                f"`relayout` must be called alike on all ranks. Rank 0 asks for {requests[0][1]} at global step "
                f"{requests[0][2]}, rank {rank} for {wanted[0]} at global step {wanted[1]}."
            )


def _problem(
    engine: Engine, request: Request, optimizers: Sequence[Optimizer], listeners: Sequence[Listener]
) -> str | None:
    """Returns the reason why this rank refuses the request; None if this rank accepts the request."""
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
            "its states has a custom `dist_reduce_fx`. Change the layout in `on_train_epoch_start`."
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
