"""The device mesh of a layout, and its process groups."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_hybrid._torch_private import default_group, flattened
from lightning_hybrid.spec.layout import Layout

AXES = ("pp", "dp", "fsdp", "ep", "tp")
"""From outermost to innermost: pp spans the slowest network, tp the fastest."""


_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Layout, str], Mesh]] = WeakKeyDictionary()
"""Meshes by default process group; they are freed with the group."""


class Place(NamedTuple):
    """A rank's index on each axis."""

    pp: int
    dp: int
    fsdp: int
    ep: int
    tp: int

    def replica(self, layout: Layout) -> int:
        """Returns the index of the rank's replica, whose ranks (of `tp` and `pp`) read the same batches."""
        return (self.dp * layout.fsdp + self.fsdp) * layout.ep + self.ep

    def shard(self, layout: Layout) -> int:
        """Returns the index of the rank's shard of the weights outside the experts."""
        return self.fsdp * layout.ep + self.ep if layout.fsdp > 1 else 0


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place in the layout."""

    layout: Layout
    device_mesh: DeviceMesh
    replica_group: dist.ProcessGroup
    """The ranks that hold the same weights and read different data: all of `dp`, `fsdp` and `ep`."""

    log_group: dist.ProcessGroup
    """The same ranks, for logs: a `self.log` on some ranks only must not be matched with another collective."""

    log_stage_group: dist.ProcessGroup
    """The ranks of this rank's pipeline, for logs."""

    holder_groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    """Groups of pipeline ranks that share weights, created so far (see `holder_group`)."""
    _step_group: list[dist.ProcessGroup] = field(default_factory=list)
    _tried: set[tuple[int, ...]] = field(default_factory=set)
    _nested: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = field(default_factory=dict)

    @classmethod
    def create(cls, layout: Layout, device_type: str) -> Mesh:
        """Returns the mesh of a layout. Collective over all ranks.

        Process groups hold threads and connections until the process ends, so later Trainers of the same processes
        reuse those of the same layout.
        """
        made = _made.setdefault(default_group(), {})
        if (layout, device_type) not in made:
            made[layout, device_type] = cls._create(layout, device_type)
        return made[layout, device_type]

    @classmethod
    def _create(cls, layout: Layout, device_type: str) -> Mesh:
        sizes = tuple(getattr(layout, axis) for axis in AXES)
        mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
        replicas = flattened(mesh["dp", "fsdp", "ep"], "replicas")
        if layout.shards > layout.fsdp:
            flattened(mesh["fsdp", "ep"], "shards")
        by_pipeline = mesh.mesh.flatten(1).T.tolist()
        by_replicas = _by_replicas(mesh, layout)
        return cls(
            layout=layout,
            device_mesh=mesh,
            replica_group=replicas.get_group(),
            log_group=_own_group(by_replicas),
            log_stage_group=_own_group(by_pipeline),
        )

    def holder_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """Returns the group of the ranks `ranks` of this rank's pipeline; None if it is none of them. Collective."""
        if ranks not in self._tried:
            self._tried.add(ranks)
            for column in self.device_mesh.mesh.flatten(1).T.tolist():
                members = [column[r] for r in ranks]
                group = dist.new_group(members)
                if dist.get_rank() in members:
                    self.holder_groups[ranks] = group  # type: ignore[assignment]
        return self.holder_groups.get(ranks)

    def step_group(self) -> dist.ProcessGroup:
        """Returns the ranks of `replica_group` for collectives inside steps. Collective over all ranks.

        Replicas that use different weights may reduce gradients earlier or later than such a collective; in one group
        the two would meet.
        """
        if not self._step_group:
            self._step_group.append(_own_group(_by_replicas(self.device_mesh, self.layout)))
        return self._step_group[0]

    @property
    def neighbors(self) -> int:
        """Number of replicas of the `dp` axis per node: the largest one that is equal on all nodes."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        step = self.layout.devices // (self.layout.pp * self.layout.dp)  # ranks from one replica to the next
        return math.gcd(self.layout.dp, max(1, here // step))

    def nested_groups(self, inner: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Returns the groups of `inner` neighbors in `dp`, and of ranks with equal index among them. Collective."""
        if self.layout.dp == 1:
            return default_group(), default_group()  # never used
        if inner not in self._nested:
            near, far = [], []
            for members in self.device_mesh.mesh.movedim(1, -1).reshape(-1, self.layout.dp).tolist():
                near += [members[i : i + inner] for i in range(0, len(members), inner)]
                far += [members[i::inner] for i in range(inner)]
            self._nested[inner] = _group_with_this_rank(near), _group_with_this_rank(far)
        return self._nested[inner]

    def rank(self, axis: str) -> int:
        """Returns this rank's index on `axis`."""
        return self.device_mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """Returns the group of ranks that differ from this one in `axis` only."""
        return self.device_mesh.get_group(axis)

    @property
    def replica(self) -> int:
        """Index of this rank's replica, whose ranks (of `tp` and `pp`) read the same batches."""
        return self.place.replica(self.layout)

    @cached_property
    def place(self) -> Place:
        """This rank's index on each axis."""
        return Place(*(self.rank(axis) for axis in AXES))

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The indices of all ranks, by rank."""
        by_rank = self.device_mesh.mesh.flatten().tolist()
        indices = itertools.product(*(range(size) for size in self.device_mesh.mesh.shape))
        found = dict(zip(by_rank, (Place(*i) for i in indices), strict=True))
        return tuple(found[rank] for rank in range(len(found)))

    def ranks_by_replica(self) -> list[list[int]]:
        """Returns the ranks of each replica."""
        return self.device_mesh.mesh.permute(1, 2, 3, 0, 4).reshape(self.layout.replicas, -1).tolist()

    @property
    def replica_of_ranks(self) -> tuple[int, ...]:
        """The replica of every rank."""
        return tuple(place.replica(self.layout) for place in self.places)

    @property
    def shard(self) -> int:
        """Index of this rank's shard of the weights outside the experts."""
        return self.place.shard(self.layout)

    def sharding(self, experts: bool) -> DeviceMesh:
        """Returns the mesh over which `fsdp` shards weights; with `dp` it has their replicas as first dim.

        Args:
            experts: True for weights of experts, which `ep` has divided already.
        """
        axis = "fsdp" if experts or self.layout.shards == self.layout.fsdp else "shards"
        return self.device_mesh["dp", axis] if self.layout.dp > 1 else self.device_mesh[axis]


def _by_replicas(mesh: DeviceMesh, layout: Layout) -> list[list[int]]:
    """Returns lists of the ranks that hold the same weights."""
    return mesh.mesh.permute(0, 4, 1, 2, 3).reshape(-1, layout.replicas).tolist()


def _own_group(all_members: list[list[int]]) -> dist.ProcessGroup:
    """Creates a group of each list of ranks, and returns the one with this rank. Collective."""
    if len(all_members[0]) == 1:
        return default_group()  # never used; a group of one costs as many threads as a large one
    return _group_with_this_rank(all_members)


def _group_with_this_rank(all_members: list[list[int]]) -> dist.ProcessGroup:
    groups = {tuple(members): dist.new_group(members) for members in all_members}
    return next(g for members, g in groups.items() if dist.get_rank() in members)  # type: ignore[return-value]
