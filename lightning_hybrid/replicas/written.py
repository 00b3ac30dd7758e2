"""Parameters that a step writes (a teacher that follows, prototypes): each replica writes its own copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout


def check_equal(written: Mapping[str, tuple[Tensor, str]], group: dist.ProcessGroup, layout: Layout) -> None:
    """Compares parameters that a step has written. Collective over the group.

    Args:
        written: Each parameter with the line that writes it, by name.
        group: One rank of each replica.
        layout: The layout.

    Raises:
        PartitionError: On all ranks, if a parameter is not equal on all replicas.
    """
    sums = torch.stack([_sums(tensor) for tensor, _ in written.values()])
    extremes = torch.stack([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    equal = (extremes[0] == -extremes[1]) | sums.isnan()
    for (name, (_, where)), same in zip(written.items(), equal.all(1).tolist(), strict=True):
        if not same:
            raise PartitionError(
                f"`layout='{layout}'`: {where} writes the parameter `{name}` in the step, with a value that depends on "
                "the samples of the replica, so replicas get different weights. Compute the value from "
                "`self.all_gather(...)` of the samples of all replicas, or use a layout of `tp` and `pp`."
            )


def _sums(tensor: Tensor) -> Tensor:
    """Returns two sums that differ if two tensors differ, in practice."""
    flat = tensor.detach().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    flat = flat.double()
    return torch.stack([flat.sum(), (flat * torch.arange(1, len(flat) + 1, device=flat.device).double().sqrt()).sum()])
