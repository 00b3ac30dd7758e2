"""Gradient clipping by the norm of the whole model, wherever its parts are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_hybrid.collectives import to_local


def clip_by_global_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    *,
    counted: set[int],
    experts: tuple[set[int], dist.ProcessGroup] | None,
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
        experts: `id`s of the parameters of experts, and the group over which they are divided, if they are.
        pipeline: The group of the stages, if there are several.
        device: This rank's device.

    Returns:
        The norm before clipping, a scalar, equal on every rank.
    """
    trained = [p for p in parameters if p.grad is not None]
    gradients: list[Tensor] = [p.grad for p in trained]  # type: ignore[misc]
    divided = experts[0] if experts is not None else set()
    double = any(g.dtype == torch.float64 for g in gradients) or pipeline is not None
    squares = torch.zeros(2, device=device, dtype=torch.float64 if double else torch.float32)
    for i, members in enumerate((counted - divided, counted & divided)):
        squares[i] = _sum_of_squares([p.grad for p in trained if id(p) in members], squares[i])  # type: ignore[misc]
    if experts is not None:
        dist.all_reduce(squares[1], group=experts[1])
    squares = squares.sum()
    if pipeline is not None:
        dist.all_reduce(squares, group=pipeline)
    total = squares.sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    for gradient in gradients:
        to_local(gradient).mul_(factor.to(gradient.device))
    return total


def _sum_of_squares(gradients: list[Tensor], like: Tensor) -> Tensor:
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_mesh[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    squares = torch.zeros_like(like)
    for group in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(group, foreach=False if isinstance(group[0], DTensor) else None)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squares += norm.to(like.device, like.dtype) ** 2
    return squares


def clip_by_value(optimizer: Optimizer, limit: int | float) -> None:
    """Clamps every element of the gradients to at most `limit` in absolute value."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for gradient in gradients:
        to_local(gradient).clamp_(-limit, limit)
