"""A strategy's processes: which rank this is, on which device, and how all ranks talk to each other."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.distributed import _distributed_is_initialized, _sync_ddp_if_available
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_hybrid.launch.monitor import FailureMonitor
from lightning_hybrid.mesh import Mesh


class ConnectedStrategy(ParallelStrategy):
    """What a strategy of Lightning says of its processes and does with all of them together.

    Args:
        process_group_backend: `"nccl"`, `"gloo"`; None chooses by device.
        watch: Notices failures of ranks.
    """

    def __init__(self, process_group_backend: str | None, watch: FailureMonitor) -> None:
        super().__init__()
        self._backend, self._watch = process_group_backend, watch
        self._mesh: Mesh | None = None
        self.num_nodes = 1

    @property
    def mesh(self) -> Mesh:
        """This rank's place in the layout, once the processes are connected."""
        if self._mesh is None:
            raise RuntimeError("`strategy.mesh` is there only after the processes have been connected (Trainer.fit).")
        return self._mesh

    @property
    def _module(self) -> pl.LightningModule:
        if self.lightning_module is None:
            raise RuntimeError("The strategy has no LightningModule yet; it gets it from the Trainer.")
        return self.lightning_module

    @property
    def _environment(self) -> ClusterEnvironment:
        if self.cluster_environment is None:
            raise RuntimeError("The strategy has no cluster environment yet; it gets it from the Trainer.")
        return self.cluster_environment

    @property
    def is_distributed(self) -> bool:
        """True: Lightning injects distributed samplers and reduces what is logged with `sync_dist`."""
        return True

    @property
    @override
    def root_device(self) -> torch.device:
        if self.parallel_devices is None:
            raise RuntimeError("The strategy has no devices yet; it gets them from the Trainer.")
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def process_group_backend(self) -> str | None:
        """The backend of the default process group."""
        return self._backend

    def _set_world_ranks(self) -> None:
        self._environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self._environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utils_rank_zero_only.rank = self.global_rank

    # ---- collectives; none once a rank has failed, when callbacks may still ask for them

    @property
    def _connected(self) -> bool:
        return _distributed_is_initialized() and not self._watch.failing

    @override
    def barrier(self, name: str | None = None) -> None:
        if self._connected:
            if dist.get_backend() == "nccl":
                dist.barrier(device_ids=[self.root_device.index or 0])
            else:
                dist.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not self._connected:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces over the replicas: ranks of `tp` and `pp` hold copies of the same value."""
        if not isinstance(tensor, Tensor) or not self._connected:
            return tensor
        if group is None and self._mesh is not None:
            if self.mesh.layout.replicas == 1:
                return tensor
            group = self.mesh.replica_group
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if not self._connected:
            return decision
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)
