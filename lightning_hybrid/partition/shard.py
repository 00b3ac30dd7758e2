"""Sharded replicas: `fully_shard` on every block and on our own step module, never on the LightningModule itself."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_hybrid.partition.ownership import Parameters


def shard_replicas(
    root: nn.Module, step_module: nn.Module, blocks: Iterable[str], parameters: Parameters, mesh: DeviceMesh
) -> set[str]:
    """Shards the held parameters over the `fsdp` axis of `mesh`, with replicas over its `dp` axis where it has one.

    Returns:
        Names of parameters that stay whole: scalars, which cannot be split.
    """
    held = parameters.held()
    scalars = {name: p for name, p in held.items() if p.ndim == 0}
    for name in blocks:
        block = root.get_submodule(name)
        own = {id(p) for p in block.parameters() if p.ndim > 0}
        if own and not _used_elsewhere(name, own, parameters):
            fully_shard(block, mesh=mesh, ignored_params=set(scalars.values()))
    if len(scalars) < len(held):
        fully_shard(step_module, mesh=mesh, ignored_params=set(scalars.values()))
    return set(scalars)


def _used_elsewhere(block: str, own: set[int], parameters: Parameters) -> bool:
    """A weight shared with another block must be gathered with both, so it stays with the step module."""
    return any(
        id(parameters[name]) in own and any(not slot.name.startswith(f"{block}.") for slot in places)
        for name, places in parameters.slots.items()
    )
