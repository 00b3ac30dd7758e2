"""The device mesh of a layout, and the process groups that it gives."""

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
"""From the slowest network to the fastest: neighbors in `tp` are neighbors in rank."""


_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Layout, str], Mesh]] = WeakKeyDictionary()
"""The meshes that were made on each default process group; they go with it."""


class Place(NamedTuple):
    """A rank's index on each axis."""

    pp: int
    dp: int
    fsdp: int
    ep: int
    tp: int

    def replica(self, layout: Layout) -> int:
        """Index of the rank's replica; its ranks (of `tp` and `pp`) see the same batches."""
        return (self.dp * layout.fsdp + self.fsdp) * layout.ep + self.ep

    def shard(self, layout: Layout) -> int:
        """Index of the rank's shard of the weights outside the experts."""
        return self.fsdp * layout.ep + self.ep if layout.fsdp > 1 else 0


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place in the layout."""

    layout: Layout
    device_mesh: DeviceMesh
    replica_group: dist.ProcessGroup
    """The ranks that hold the same weights and see other data: all of `dp`, `fsdp` and `ep`."""

    log_group: dist.ProcessGroup
    """The same ranks, for what is logged: a call of `self.log` on some ranks only must not meet another collective."""

    log_stage_group: dist.ProcessGroup
    """The ranks of this rank's pipeline, for what is logged."""

    holder_groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    """Groups of pipeline ranks that share weights, as far as they have been made (see `holder_group`)."""
    _tried: set[tuple[int, ...]] = field(default_factory=set)
    _nested: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = field(default_factory=dict)

    @classmethod
    def create(cls, layout: Layout, device_type: str) -> Mesh:
        """The mesh of a layout; collective over all ranks.

        Process groups hold threads and connections for as long as the process lives, so that a later Trainer of the
        same processes with the same layout gets the same ones.
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
        by_replicas = mesh.mesh.permute(0, 4, 1, 2, 3).reshape(-1, layout.replicas).tolist()
        return cls(
            layout=layout,
            device_mesh=mesh,
            replica_group=replicas.get_group(),
            log_group=_own_group(by_replicas),
            log_stage_group=_own_group(by_pipeline),
        )

    def holder_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The group of the pipeline ranks `ranks` of this rank's column; None if it is none of them. Collective."""
        if ranks not in self._tried:
            self._tried.add(ranks)
            for column in self.device_mesh.mesh.flatten(1).T.tolist():
                members = [column[r] for r in ranks]
                group = dist.new_group(members)
                if dist.get_rank() in members:
                    self.holder_groups[ranks] = group  # type: ignore[assignment]
        return self.holder_groups.get(ranks)

    @property
    def neighbors(self) -> int:
        """How many replicas of the `dp` axis are on one node: the largest such number that is the same everywhere."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        step = self.layout.devices // (self.layout.pp * self.layout.dp)  # ranks from one replica to the next
        return math.gcd(self.layout.dp, max(1, here // step))

    def nested_groups(self, inner: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Of the ranks of `dp`: `inner` neighbors, and the ranks with the same place among theirs. Collective."""
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
        """This rank's index on `axis`."""
        return self.device_mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in `axis` only."""
        return self.device_mesh.get_group(axis)

    @property
    def replica(self) -> int:
        """Index of this rank's replica; its ranks (of `tp` and `pp`) see the same batches."""
        return self.place.replica(self.layout)

    @cached_property
    def place(self) -> Place:
        """This rank's index on each axis."""
        return Place(*(self.rank(axis) for axis in AXES))

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Those of all ranks, by rank."""
        by_rank = self.device_mesh.mesh.flatten().tolist()
        indices = itertools.product(*(range(size) for size in self.device_mesh.mesh.shape))
        found = dict(zip(by_rank, (Place(*i) for i in indices), strict=True))
        return tuple(found[rank] for rank in range(len(found)))

    def ranks_by_replica(self) -> list[list[int]]:
        """The ranks of each replica."""
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
        """The mesh over which `fsdp` shards weights, with their replicas as a first dim where there are any.

        Args:
            experts: Whether it is for experts, which `ep` has divided already.
        """
        axis = "fsdp" if experts or self.layout.shards == self.layout.fsdp else "shards"
        return self.device_mesh["dp", axis] if self.layout.dp > 1 else self.device_mesh[axis]


def _own_group(all_members: list[list[int]]) -> dist.ProcessGroup:
    """Makes a group of each list of ranks, and gives the one with this rank. Collective."""
    if len(all_members[0]) == 1:
        return default_group()  # never used; a group of one costs as many threads as a large one
    return _group_with_this_rank(all_members)


def _group_with_this_rank(all_members: list[list[int]]) -> dist.ProcessGroup:
    groups = {tuple(members): dist.new_group(members) for members in all_members}
    return next(g for members, g in groups.items() if dist.get_rank() in members)  # type: ignore[return-value]
