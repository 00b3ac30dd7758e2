"""Gradient clipping by the norm of the whole model, wherever its parts are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_hybrid.execute.gradients import local


def clip_by_global_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    *,
    counted: set[int],
    pipeline: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    """Scales gradients so that the 2-norm over all parameters of the model is at most `max_norm`.

    Norms are taken per device mesh (torch refuses to mix them) and combined; a weight that several stages hold counts
    on one of them.

    Args:
        parameters: The parameters of an optimizer on this rank.
        max_norm: The largest norm allowed.
        counted: `id`s of the parameters that this rank counts.
        pipeline: The group of the stages, if there are several.
        device: This rank's device.

    Returns:
        The norm before clipping, a scalar, equal on every rank.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    kept = [p.grad for p in parameters if p.grad is not None and id(p) in counted]
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for gradient in kept:
        by_mesh[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    double = any(g.dtype == torch.float64 for g in gradients)
    squares = torch.zeros((), device=device, dtype=torch.float64 if double or pipeline is not None else torch.float32)
    for group in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(group, foreach=False if isinstance(group[0], DTensor) else None)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squares += norm.to(device, squares.dtype) ** 2
    if pipeline is not None:
        dist.all_reduce(squares, group=pipeline)
    total = squares.sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    for gradient in gradients:
        local(gradient).mul_(factor.to(gradient.device))
    return total


def clip_by_value(optimizer: Optimizer, limit: int | float) -> None:
    """Clamps every element of the gradients to at most `limit` in absolute value."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for gradient in gradients:
        local(gradient).clamp_(-limit, limit)
