"""Objects with tensors in them, from one rank to the others of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor


def to_host(value: Any) -> Any:
    """`value` with its tensors on the CPU and without their graphs, to be sent as an object."""
    return apply_to_collection(value, Tensor, lambda t: t.detach().cpu())


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`."""
    return apply_to_collection(value, Tensor, lambda t: t.to(device))


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, by rank, on all of them; collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def share_object(value: Any, source: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Gives every rank of `group` the `value` of its rank `source`, tensors on the receiver's device; collective."""
    own = dist.get_rank(group) == source
    box = [to_host(value) if own else None]
    dist.broadcast_object_list(box, dist.get_global_rank(group, source), group=group)
    return value if own else to_device(box[0], device)


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
