"""Gradient clipping by the norm of the whole model, wherever its parts are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def clip_by_global_norm(
    parameters: Iterable[Tensor], max_norm: float, *, counted: set[int], pipeline: dist.ProcessGroup | None
) -> Tensor:
    """Scales gradients so that the 2-norm over all parameters of the model is at most `max_norm`.

    Norms are taken per device mesh (torch refuses to mix them) and combined; a weight that several stages hold counts
    on one of them.

    Args:
        parameters: The parameters of an optimizer on this rank.
        max_norm: The largest norm allowed.
        counted: `id`s of the parameters that this rank counts.
        pipeline: The group of the stages, if there are several.

    Returns:
        The norm before clipping, a scalar, equal on every rank.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    kept = [p.grad for p in parameters if p.grad is not None and id(p) in counted]
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for gradient in kept:
        by_mesh[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    device = gradients[0].device if gradients else torch.device("cpu")
    squares = torch.zeros((), device=device)
    for group in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(group, foreach=False if isinstance(group[0], DTensor) else None)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squares += norm.to(device, torch.float32) ** 2
    if pipeline is not None:
        dist.all_reduce(squares, group=pipeline)
    total = squares.sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    for gradient in gradients:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor.to(gradient.device))
    return total
