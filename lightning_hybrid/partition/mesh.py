"""The device mesh of a layout, and the process groups that it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_hybrid.spec.layout import Layout

AXES = ("pp", "dp", "fsdp", "tp")
"""From the slowest network to the fastest: neighbours in `tp` are neighbours in rank."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place in the layout."""

    layout: Layout
    device_mesh: DeviceMesh
    replica_group: dist.ProcessGroup
    """The ranks that hold the same weights and see other data: all of `dp` and `fsdp`."""

    @classmethod
    def create(cls, layout: Layout, device_type: str) -> Mesh:
        """Creates the process groups; collective over all ranks."""
        sizes = tuple(getattr(layout, axis) for axis in AXES)
        mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
        replicas = mesh["dp", "fsdp"]._flatten("replicas")
        return cls(layout=layout, device_mesh=mesh, replica_group=replicas.get_group())

    def rank(self, axis: str) -> int:
        """This rank's index on `axis`."""
        return self.device_mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in `axis` only."""
        return self.device_mesh.get_group(axis)

    @property
    def replica(self) -> int:
        """Index of this rank's replica; its ranks (of `tp` and `pp`) see the same batches."""
        return self.rank("dp") * self.layout.fsdp + self.rank("fsdp")
