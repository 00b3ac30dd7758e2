"""Builds the order of collectives of a partitioned module."""

from __future__ import annotations

import time
from functools import partial

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from lightning_hybrid._torch_private import announce_collectives
from lightning_hybrid.launch.questions import Questions
from lightning_hybrid.launch.world import World
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.replicas.order import CollectiveOrder


def collective_order(partition: Partition, world: World) -> CollectiveOrder:
    """Returns the order of collectives, which fully sharded modules announce to it. Collective over all ranks."""
    mesh, layout = partition.mesh, partition.plan.layout
    if layout.replicas == 1:
        return CollectiveOrder(None, layout, [dist.get_rank()], 0)
    ranks = dist.get_process_group_ranks(mesh.replica_group)
    name = f"{world.broadcast(time.time_ns(), 0)}.{min(ranks)}"
    questions = Questions(world.monitor, ranks, name, world.timeout.total_seconds() / 2)
    order = CollectiveOrder(questions, layout, ranks, mesh.replica)
    names = {module: f"`{name}`" for name, module in partition.root.named_modules()}
    names[partition.step_module] = "the modules outside the blocks"
    for module, text in names.items():
        if isinstance(module, FSDPModule):
            announce_collectives(
                module,
                partial(order.next, f"needs the weights of {text}"),
                partial(order.next, f"reduces the gradients of {text}"),
            )
    return order
