"""Placement of parameters: the part that a rank holds, and the ranks that hold the same part."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hybrid.mesh import Place
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.spec.tensor_index import Index, Run, runs_of, whole_index


def index_of(partition: Partition, name: str) -> Index:
    """Returns this rank's part of parameter `name`: divided over `ep` or `tp`, then over `fsdp` along dim 0."""
    return index_at(partition, name, partition.shape_of(name), partition.mesh.place)


def index_at(partition: Partition, name: str, shape: Sequence[int], place: Place) -> Index:
    """Returns the part of parameter `name`, with whole shape `shape`, of a rank at `place` that holds the parameter."""
    dims: list[tuple[Run, ...]] = list(whole_index(shape))
    layout = partition.plan.layout
    sharded = partition.plan.sharded_over_tp(name)
    if sharded is not None:
        dims[sharded.dim] = runs_of(sharded.part(place.tp, layout.tp))
    experts = partition.expert_plan_of(name)
    if experts is not None:
        dims[0] = runs_of(experts.part(place.ep, layout.ep))
    if layout.fsdp > 1 and name not in partition.whole:
        shards, shard = (layout.shards, place.shard(layout)) if experts is None else (layout.fsdp, place.fsdp)
        dims[0] = _chunk(dims[0], shards, shard)
    return tuple(dims)


def selected(whole: Tensor, index: Index) -> Tensor:
    """Returns the part `index` of a whole tensor: a view if it is one run of each dim."""
    for dim, runs in enumerate(index):
        if runs != ((0, whole.shape[dim]),):
            pieces = [whole.narrow(dim, start, stop - start) for start, stop in runs]
            whole = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0] if pieces else whole.narrow(dim, 0, 0)
    return whole


def writes(partition: Partition, name: str, whole: bool = False) -> bool:
    """Returns True if this rank writes its part of `name`, among the ranks that hold the same part.

    The parts of a model are spread over the replicas, so that all ranks write about equal amounts.

    Args:
        partition: The applied partition.
        name: A parameter that this rank holds.
        whole: True for state of the parameter that every holder has whole (a step count).
    """
    layout, mesh = partition.plan.layout, partition.mesh
    holders = partition.plan.ranks_of(name)
    places = [(holders.index(mesh.rank("pp")), len(holders)), (mesh.rank("dp"), layout.dp)]
    sharded = not (whole or name in partition.whole or layout.fsdp == 1)
    if not sharded:
        places.append((mesh.rank("fsdp"), layout.fsdp))
    if whole or (partition.expert_plan_of(name) is None and not sharded):
        places.append((mesh.rank("ep"), layout.ep))
    if whole or partition.plan.sharded_over_tp(name) is None:
        places.append((mesh.rank("tp"), layout.tp))
    own, copies = 0, 1
    for position, count in places:
        own, copies = own * count + position, copies * count
    return own == zlib.crc32(name.encode()) % copies


def _chunk(runs: tuple[Run, ...], count: int, position: int) -> tuple[Run, ...]:
    """Returns the chunk at `position` of `count`, as by `torch.chunk`, which `fully_shard` uses to split dim 0."""
    length = sum(stop - start for start, stop in runs)
    step = -(-length // count)
    first, last = min(position * step, length), min((position + 1) * step, length)
    chosen, offset = [], 0
    for start, stop in runs:
        a, b = max(first - offset, 0), min(last - offset, stop - start)
        if a < b:
            chosen.append((start + a, start + b))
        offset += stop - start
    return tuple(chosen)
