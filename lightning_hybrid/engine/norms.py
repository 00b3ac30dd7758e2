"""Norms of gradients: each rank measures its own parts once, and a norm over the model adds up their squares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_hybrid._torch_private import norms_of
from lightning_hybrid.collectives import to_local
from lightning_hybrid.parallelize.apply import Partition

PREFIX = "grad_2.0_norm"
"""As `lightning.pytorch.utilities.grad_norm(module, 2)` names them."""

_AXES = ("pp", "fsdp", "ep", "tp")
"""The axes that divide the gradients of a model; replicas of `dp` have all of them."""


def local_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Returns the 2-norm of this rank's part of each gradient, those of half precision in float32."""
    parts = [to_local(g).detach() for g in gradients]
    return norms_of([p.coalesce().values() if p.is_sparse else p for p in parts])


def norms_by_id(optimizer: Optimizer) -> dict[int, Tensor]:
    """Returns the `local_norms` of an optimizer's gradients, by the `id` of the parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return dict(zip(map(id, parameters), local_norms([p.grad for p in parameters]), strict=True))


def local_square(
    partition: Partition,
    norms: Mapping[int, Tensor],
    device: torch.device,
    among: Callable[[str], bool] = lambda name: True,
) -> Tensor:
    """Adds up the squares that this rank counts; their sum over a replica of `dp` is the square of the global norm.

    Args:
        partition: The applied partition.
        norms: The `local_norms` by the `id` of the parameter.
        device: This rank's device.
        among: Says by name which parameters belong to the norm.

    Returns:
        A scalar of type float64.
    """
    counted = [
        norms[id(parameter)].to(device)
        for name, parameter in partition.parameters.local().items()
        if id(parameter) in norms and _counts(partition, name) and among(name)
    ]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in counted]).square().sum()


def global_norm(partition: Partition, optimizer: Optimizer, device: torch.device) -> Tensor:
    """Returns the 2-norm over all of an optimizer's gradients, whichever ranks have them. Collective over a replica."""
    square = local_square(partition, norms_by_id(optimizer), device)
    return _sum_over_model(partition, square).sqrt()


def gradient_norms(partition: Partition, device: torch.device) -> dict[str, Tensor]:
    """Returns the 2-norm of every parameter's gradient, and of all together. Collective over a replica of `dp`."""
    names, local = partition.parameters.names, partition.parameters.local()
    with_gradient = [n for n in names if n in local and local[n].grad is not None]
    norms = dict(zip(with_gradient, local_norms([local[n].grad for n in with_gradient]), strict=True))  # type: ignore[misc]
    squares = torch.zeros(len(names), 2, dtype=torch.float64, device=device)  # and whether there is a gradient
    for i, name in enumerate(names):
        if name in norms:
            squares[i, 0] = norms[name].double().square() * _counts(partition, name)
            squares[i, 1] = 1
    there = _sum_over_model(partition, squares)[:, 1].tolist()
    found = {f"{PREFIX}/{n}": squares[i, 0].sqrt().float() for i, n in enumerate(names) if there[i]}
    return found | ({f"{PREFIX}_total": squares[:, 0].sum().sqrt().float()} if found else {})


def _counts(partition: Partition, name: str) -> bool:
    """Whether this rank, among those of its replica of `dp` that hold the same part of `name`, counts it."""
    place, layout = partition.mesh.place, partition.plan.layout
    sharded = layout.fsdp > 1 and name not in partition.whole
    tensor_plan = partition.plan.tensor_plan
    divided = tensor_plan is not None and name in tensor_plan.parameters
    return (
        place.pp == partition.plan.ranks_of(name)[0]
        and (place.fsdp == 0 or sharded)
        and (place.ep == 0 or sharded or partition.expert_plan_of(name) is not None)
        and (place.tp == 0 or divided)
    )


def _sum_over_model(partition: Partition, values: Tensor) -> Tensor:
    """Adds `values` up in place over the ranks of this rank's replica of `dp`."""
    for axis in _AXES:
        if getattr(partition.plan.layout, axis) > 1:
            dist.all_reduce(values, group=partition.mesh.group(axis))
    return values
