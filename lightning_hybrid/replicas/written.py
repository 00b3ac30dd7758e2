"""Parameters and buffers that a step writes (a teacher that follows, a queue): each replica writes its own copy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

_ROUNDING = 1e-6
"""Largest difference between sums, relative to the sum of magnitudes; several times the rounding of float32."""


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


def check_equal_buffers(buffers: Mapping[str, Tensor], where: str, group: dist.ProcessGroup, layout: Layout) -> None:
    """Compares the buffers of replicas after a step. Collective over the group.

    Args:
        buffers: The buffers by name.
        where: The location of the step.
        group: One rank of each replica.
        layout: The layout.

    Raises:
        PartitionError: On all ranks, if a buffer has other values on another replica.
    """
    own = {name: (tuple(buffer.shape), sums_of(buffer)) for name, buffer in buffers.items()}
    found: list[dict[str, Any]] = gather_objects(own, group)
    for name in sorted(set().union(*found)):
        by_shape: dict[tuple[int, ...], list[tuple[float, ...]]] = defaultdict(list)
        for shape, sums in (replica[name] for replica in found if name in replica):
            by_shape[shape].append(sums)  # of other shapes are those that grow with the batch, such as masks
        if not all(alike(shape, sums) for shape, sums in by_shape.items()):
            raise PartitionError(
                f"`layout='{layout}'`: the step ({where}) computes the buffer `{name}` from the samples of a replica, "
                f"so the {len(found)} replicas have other values, where one process has one for all samples. Compute "
                "it from `self.all_gather(...)` of the samples of all replicas, keep what each replica is to have for "
                "itself in an attribute instead of a buffer, or use a layout of `tp` and `pp`."
            )


def sums_of(tensor: Tensor) -> tuple[float, ...]:
    """Returns two sums that differ if two tensors differ, in practice, and the sum of magnitudes, for `alike`."""
    return (*_sums(tensor).tolist(), float(tensor.detach().abs().double().sum()))


def alike(shape: tuple[int, ...], found: Sequence[tuple[float, ...]]) -> bool:
    """Returns True if both sums of each replica are those of the first one, up to rounding."""
    *mine, magnitude = found[0]
    limit = _ROUNDING * max(math.prod(shape), 1) ** 0.5 * magnitude
    pairs = [pair for other in found[1:] for pair in zip(mine, other[:2], strict=True)]
    return not any(abs(a - b) > limit for a, b in pairs)  # NaN is equal to all


def _sums(tensor: Tensor) -> Tensor:
    """Returns two sums that differ if two tensors differ, in practice."""
    flat = tensor.detach().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    flat = flat.double()
    return torch.stack([flat.sum(), (flat * torch.arange(1, len(flat) + 1, device=flat.device).double().sqrt()).sum()])
