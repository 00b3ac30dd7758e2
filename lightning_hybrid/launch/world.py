"""Connects all ranks of a run, and runs the collectives that Lightning requires of a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch import Tensor

from lightning_hybrid._lightning_private import default_backend, init_process_group, reduce_tensor
from lightning_hybrid._torch_private import limit_waiting
from lightning_hybrid.launch import agreement
from lightning_hybrid.launch.monitor import FailureMonitor
from lightning_hybrid.launch.preemption import Preemption
from lightning_hybrid.launch.processes import DEFAULT_TIMEOUT, meet
from lightning_hybrid.launch.stopping import Stopping
from lightning_hybrid.launch.terminal import lightning_is_quiet


class World:
    """Connects the processes of a run, and runs collectives over them.

    Collectives do nothing after a rank has failed, when callbacks may still call them.

    Args:
        backend: `"nccl"` or `"gloo"`; None: chosen by device.
        timeout: The longest wait of one rank for another.

    Raises:
        ValueError: If there is no such backend, or `timeout` is no time.
    """

    def __init__(self, backend: str | None, timeout: timedelta | None) -> None:
        _check_backend(backend)
        if timeout is not None and (not isinstance(timeout, timedelta) or timeout <= timedelta()):
            raise ValueError(
                f"`timeout` must be None or a `datetime.timedelta` above 0, such as timedelta(minutes=30). Got "
                f"{timeout!r}."
            )
        self.backend, self._timeout = backend, timeout
        self._device: torch.device | None = None
        self.monitor = FailureMonitor(timeout or DEFAULT_TIMEOUT)
        self.preemption = Preemption(self.any_rank)
        self.stopping = Stopping(self.any_rank)
        self.moving = False
        """True while weights move to another layout."""

    def connect(
        self, environment: ClusterEnvironment, device: torch.device, trainer: pl.Trainer, arguments: Mapping[str, Any]
    ) -> None:
        """Connects all ranks, compares what they run, and creates the default process group. Collective.

        Args:
            environment: Lightning's cluster environment, which knows rank and world size.
            device: This rank's device.
            trainer: The trainer.
            arguments: The arguments of the strategy that must be equal on all ranks, by name.
        """
        self.backend, self._device = self.backend or default_backend(device), device
        rank, size = environment.global_rank(), environment.world_size()
        if size > 1:
            facts = agreement.facts_of(trainer, arguments)
            with self.monitor.during("the meeting of the ranks"):
                met = meet(environment, rank, size, self._timeout, facts, self.monitor.check_children)
            self.monitor.connect(met)
            agreement.check_facts(met.facts)
        with lightning_is_quiet():
            init_process_group(environment, self.backend, self._timeout, device if self.backend == "nccl" else None)

    def limit_waiting(self) -> None:
        """Sets the timeout of all process groups that exist now."""
        limit_waiting(self._timeout or DEFAULT_TIMEOUT)

    @property
    def timeout(self) -> timedelta:
        """The longest wait of one rank for another."""
        return self._timeout or DEFAULT_TIMEOUT

    @property
    def unsavable(self) -> bool:
        """True if checkpoints cannot be saved: once a rank has failed, and while weights move to another layout."""
        return self.monitor.failing or self.moving

    @property
    def _connected(self) -> bool:
        return dist.is_available() and dist.is_initialized() and not self.monitor.failing

    def barrier(self, device: torch.device) -> None:
        """Waits for all ranks."""
        if self._connected:
            dist.barrier(device_ids=[device.index or 0] if dist.get_backend() == "nccl" else None)

    def broadcast(self, value: Any, source: int) -> Any:
        """Returns the `value` of rank `source` on all ranks."""
        if not self._connected:
            return value
        box = [value]
        dist.broadcast_object_list(box, source)
        return box[0]

    def reduce(self, tensor: Any, group: dist.ProcessGroup | None, operation: Any) -> Any:
        """Returns `tensor` reduced over `group`, or over all ranks; any other value, or that of one rank, unchanged."""
        if not isinstance(tensor, Tensor) or not self._connected or dist.get_world_size(group) == 1:
            return tensor
        return reduce_tensor(tensor, group, operation)

    def vote(self, decision: bool, device: torch.device | None, *, all: bool) -> bool:
        """Returns True if `decision` is True on all ranks (with `all`), or on any rank."""
        if not self._connected:
            return decision
        votes = torch.tensor(int(decision), device=device)
        dist.all_reduce(votes)
        return bool(votes == dist.get_world_size()) if all else bool(votes)

    def any_rank(self, decision: bool) -> bool:
        """Returns True if `decision` is True on any of the connected ranks."""
        return self.vote(decision, self._device, all=False)


def _check_backend(backend: str | None) -> None:
    if backend is None:
        return
    names = [part.rpartition(":")[2] for part in str(backend).split(",")]  # also "cpu:gloo,cuda:nccl"
    missing = [name for name in names if not dist.is_backend_available(name)]
    if missing:
        here = [name for name in ("gloo", "nccl", "ucc", "mpi") if dist.is_backend_available(name)]
        raise ValueError(
            f"`process_group_backend` must be a backend of this build of torch: {', '.join(here)}. Got {backend!r}."
        )


def set_ranks(environment: ClusterEnvironment, nodes: int, processes: int) -> None:
    """Sets rank and world size of `environment`, and the rank that Lightning's rank-zero messages use.

    Args:
        environment: Lightning's cluster environment.
        nodes: Number of nodes.
        processes: Number of processes per node.
    """
    environment.set_global_rank(environment.node_rank() * processes + environment.local_rank())
    environment.set_world_size(nodes * processes)
    rank_zero_only.rank = utils_rank_zero_only.rank = environment.global_rank()
