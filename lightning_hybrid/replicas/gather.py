"""`self.all_gather`: gathers over the replicas, each of which has other samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._torch_private import sum_over_group
from lightning_hybrid.ghosts.ghost import Ghost


def gather_replicas(
    tensor: Tensor, group: dist.ProcessGroup, *, sync_grads: bool, announce: Callable[[str], bool]
) -> Tensor:
    """Returns the tensors of all replicas, stacked; with one replica the tensor itself, as in one process.

    Args:
        tensor: This replica's tensor, of the same shape on all replicas.
        group: One rank of each replica.
        sync_grads: True to differentiate: each replica's tensor gets the sum of the gradients of all replicas.
        announce: Called before the ranks communicate, with what this rank does; returns False in a dry run.
    """
    if isinstance(tensor, Ghost) and tensor.received is not None:
        tensor = tensor.received
    if group.size() == 1:
        return tensor
    if isinstance(tensor, Ghost) or not announce(f"gathers a tensor of shape {tuple(tensor.shape)}"):
        return torch.stack([tensor] * group.size())
    if sync_grads and tensor.requires_grad and torch.is_grad_enabled():
        own = dist.get_rank(group)
        zeros = torch.zeros_like(tensor)
        return sum_over_group(torch.stack([tensor if r == own else zeros for r in range(group.size())]), group)
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.stack(parts)
