"""Reduces gradients over replicas during the backward pass, or leaves synchronization to DiLoCo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_hybrid._torch_private import (
    finish_sharded_backward,
    forget_sharded_step,
    freeze_as_gathered,
    gathered_parameters,
    gradients_taken_by,
    scale_sharded_gradients,
    user_location,
)
from lightning_hybrid.collectives import to_local
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas.diloco import DiLoCo
from lightning_hybrid.replicas.reducer import (
    ReplicaReducer,
    StashedGradients,
    gradients_of,
    refuse_gradients,
    sum_over_holders,
)
from lightning_hybrid.replicas.separation import separate_gradients
from lightning_hybrid.spec.errors import PartitionError


class ReplicaGradients:
    """Synchronizes the gradients of a partitioned module over its replicas, as set by `gradient_sync`.

    Args:
        partition: The applied partition.
        on_complete: Called when this rank has computed its gradients of a batch.
        waiting: Surrounds the wait for the gradients of other ranks.
    """

    def __init__(
        self, partition: Partition, on_complete: Callable[[], None], waiting: Callable[[], AbstractContextManager]
    ) -> None:
        self._partition, self._mesh, self._on_complete = partition, partition.mesh, on_complete
        self._waiting = waiting
        layout = partition.plan.layout
        local = partition.parameters.local()
        names = partition.whole.intersection(local) if layout.fsdp > 1 else local
        self._reduced = {n: local[n] for n in local if n in names} if layout.replicas > 1 else {}
        self._uses_diloco = partition.plan.gradient_sync.kind == "diloco" and layout.replicas > 1
        self._reduction = partition.reduction()
        self._sync, self._delivered = True, False
        self.seen_by_hooks = False
        """True if a hook of the user, on any rank, sees the gradients of every accumulated batch."""
        self.users_backward = False
        """True if the user's `backward` runs the backward pass, and may scale the loss."""
        self.diloco: DiLoCo | None = None
        """The outer optimizer if replicas step independently, otherwise None."""
        self._trained: list[bool] = []
        self._reducers: list[ReplicaReducer] = []
        self.follow_frozen()

    def follow_frozen(self) -> None:
        """Rebuilds the reducers if parameters have been frozen or unfrozen since the last step.

        With manual optimization, where a step may freeze other parameters for each optimizer, only if some were
        unfrozen that have no reducer.
        """
        trained = [p.requires_grad for p in self._reduced.values()]
        if not getattr(self._partition.root, "automatic_optimization", True) and self._trained:
            trained = [now or before for now, before in zip(trained, self._trained, strict=True)]
        if trained == self._trained:
            return
        self._trained = trained
        self.release()
        wanted = {n: p for (n, p), used in zip(self._reduced.items(), trained, strict=True) if used}
        if self._uses_diloco:
            if self.diloco is not None:
                self.diloco.agree()
            self.diloco = DiLoCo(wanted, self._mesh.replica_group, self._partition.plan.gradient_sync)
            return
        experts = [n for n in wanted if self._partition.expert_plan_of(n) is not None]
        replicas = self._mesh.layout.replicas
        self._reducers = [
            ReplicaReducer([wanted[n] for n in names], group, replicas, self._reduction)
            for names, group in (
                ([n for n in wanted if n not in experts], self._mesh.replica_group),
                (experts, self._mesh.group("dp")),
            )
            if names
        ]
        for reducer in self._reducers:
            reducer.enabled = self._sync
            reducer.on_complete, reducer.waiting = self._on_complete, self._waiting
            if self._mesh.layout.pp == 1:
                reducer.overlap()

    def keep_frozen(self) -> None:
        """Keeps which weights the step has frozen or unfrozen, after its forward pass."""
        if self._sharded is not None:
            freeze_as_gathered(self._sharded)

    def resume(self) -> None:
        """Adds the reducers' hooks to the parameters again after `release`, without those frozen since."""
        self.follow_frozen()
        if self._mesh.layout.pp == 1:
            for reducer in self._reducers:
                reducer.release()
                reducer.overlap()

    def release(self) -> None:
        """Removes the reducers' hooks from the parameters."""
        for reducer in self._reducers:
            reducer.release()

    @property
    def reduces(self) -> bool:
        """True if the gradients of the running batch are reduced, not only accumulated."""
        return self._sync

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Surrounds a backward pass; afterwards gradients are reduced on all replicas, or on none."""
        for reducer in self._reducers:
            reducer.begin_backward(overlap=self._mesh.layout.fsdp == 1)
        yield
        for reducer in self._reducers:
            reducer.end_backward()

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends per step to synchronize gradients, without the gathering of sharded weights."""
        layout, total = self._mesh.layout, sum(reducer.sent_bytes for reducer in self._reducers)
        if self.diloco is not None:
            total += self.diloco.sent_bytes
        if layout.fsdp > 1:
            item = 2 if self._partition.plan.gradient_sync.kind in ("bf16", "bf16_fp32acc") else None
            for name, parameter in self._partition.parameters.local().items():
                if parameter.requires_grad and name not in self._partition.whole:
                    shards = layout.shards if self._partition.expert_plan_of(name) is None else layout.fsdp
                    own = to_local(parameter.detach())
                    total += (shards - 1) * own.numel() * (item or own.element_size())
        return total

    def log_sent_bytes(self, trainer: pl.Trainer) -> None:
        """Logs `sent_bytes` to all loggers in MiB, unless gradient synchronization is exact."""
        if self._partition.plan.gradient_sync.kind != "exact":
            sent_mib = {"gradient_sync/sent_mib_per_step": self.sent_bytes / 2**20}
            for logger in trainer.loggers:
                logger.log_metrics(sent_mib, step=trainer.global_step)

    @property
    def _sharded(self) -> FSDPModule | None:
        module = self._partition.step_module
        return module if isinstance(module, FSDPModule) else None

    def refused_inside_step(self) -> AbstractContextManager:
        """Returns a context for a step that refuses `torch.autograd.grad` if `fsdp` shards weights."""
        layout = self._mesh.layout
        return gradients_taken_by(refuse_gradients(layout)) if layout.fsdp > 1 else nullcontext()

    def separate(self) -> None:
        """Gives each gradient memory of its own, after the first of several backward passes; see `separation`."""
        local = self._partition.parameters.local()
        if self._sharded is None:
            separate_gradients(local.values())
        else:  # gradients of shards are results of a collective
            separate_gradients([*gathered_parameters(self._sharded), *(local[n] for n in self._partition.whole)])

    # ---- pipelines, whose schedule runs the backward pass of all microbatches inside the step

    def begin_pipeline(self) -> tuple[StashedGradients, dict[str, Tensor]]:
        """Stashes the gradients of earlier batches, and defers the reduction that `fsdp` would do per microbatch.

        Returns:
            The stashed gradients, and by name the weights that other stages hold, too.
        """
        local = self._partition.parameters.local()  # before the forward pass: sharded, where `fsdp` divides them
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(False)
            self._sharded.set_is_last_backward(False)
            self._sharded.set_reshard_after_backward(False)
        tied: dict[str, Tensor] = {name: local[name] for name in self._partition.tied_weight_groups}
        return StashedGradients(p for p in local.values() if p.requires_grad), tied

    def finish_pipeline(
        self, stashed: StashedGradients, tied: Mapping[str, Tensor], scale: float | Tensor, gradient: Tensor
    ) -> None:
        """Adds stashed gradients, reduces over replicas, and sums gradients of tied weights over their holders.

        Args:
            stashed: The gradients that the schedule has computed.
            tied: The weights that other stages hold, too.
            scale: Factor on the loss in the schedule.
            gradient: Gradient of the loss in `backward`: `scale`, times a factor of the user's `backward`.

        Raises:
            PartitionError: If the user's `backward` needs the graph of the step.
        """
        factor = None
        if self.users_backward:
            factor = gradient.detach() / scale
            self._check_users_backward()
        summed = gradients_of(tied) if self.seen_by_hooks else {}
        stashed.add(factor)
        if self._sync:
            if self._sharded is not None:
                if factor is not None:
                    scale_sharded_gradients(self._sharded, factor)
                finish_sharded_backward(self._sharded)
            for reducer in self._reducers:
                reducer.finish()
            sum_over_holders(self._partition.tied_weight_groups, tied.__getitem__, summed)

    def _check_users_backward(self) -> None:
        if torch.is_grad_enabled():
            raise PartitionError(self._refusal("runs the backward pass with `create_graph=True`"))
        if self._delivered and self._sharded is not None:
            raise PartitionError(
                self._refusal("runs the backward pass of the loss twice, whose weights `fsdp` divides")
            )
        self._delivered = True

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Refuses, during the user's `backward` under `pp`, what needs the graph of the step."""
        self._delivered = False
        if not self.users_backward or self._mesh.layout.pp == 1:
            yield
            return
        run = torch.autograd.backward

        def grad(*args: Any, **kwargs: Any) -> Any:
            raise PartitionError(self._refusal("calls `torch.autograd.grad`"))

        def backward(*args: Any, inputs: Any = None, **kwargs: Any) -> None:
            if inputs is not None:
                raise PartitionError(self._refusal("runs the backward pass of some weights only (`inputs=`)"))
            run(*args, **kwargs)

        with gradients_taken_by(grad), patched(torch.autograd, backward=backward):
            yield
        if not self._delivered and self._sharded is not None:
            forget_sharded_step(self._sharded)

    def _refusal(self, what: str) -> str:
        layout = self._mesh.layout
        return (
            f"{user_location()}: `backward` {what}. Under `layout='{layout}'` the gradients have been computed by the "
            f"pipeline, and `backward` can only scale them and add to them. Use a layout without `pp`, such as "
            f"'{layout.moved('pp', 'dp')}'."
        )

    # ---- accumulation

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """Accumulates gradients without communication (all but the last accumulated batch).

        If a hook of the user sees the gradients in between, they are synchronized nevertheless.
        """
        self._set_sync(self.seen_by_hooks)
        try:
            yield
        finally:
            self._set_sync(True)

    @contextmanager
    def synchronized(self) -> Iterator[None]:
        """Synchronizes gradients for the duration of the context, also within `local_only`."""
        before = self._sync
        self._set_sync(True)
        try:
            yield
        finally:
            self._set_sync(before)

    def _set_sync(self, sync: bool) -> None:
        self._sync = sync
        for reducer in self._reducers:
            reducer.enabled = sync
        if self._sharded is not None and self._mesh.layout.pp == 1:
            self._sharded.set_requires_gradient_sync(sync)
