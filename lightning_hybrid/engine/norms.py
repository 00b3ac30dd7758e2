"""Norms of gradients: each rank computes the norms of its own parts once; a global norm sums their squares."""

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
"""Prefix of the names that `lightning.pytorch.utilities.grad_norm(module, 2)` gives to norms."""

AXES = ("pp", "fsdp", "ep", "tp")
"""Axes that divide the gradients of a model; each replica of `dp` has all gradients."""


def local_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Returns the 2-norm of this rank's part of each gradient, in float32 for half precision."""
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
    """Returns the sum of squares that this rank counts; summed over a `dp` replica, the square of the global norm.

    Args:
        partition: The applied partition.
        norms: The `local_norms` by the `id` of the parameter.
        device: This rank's device.
        among: Returns True for the name of a parameter that belongs to the norm.

    Returns:
        A scalar of type float64.
    """
    counted = [
        norms[id(parameter)].to(device)
        for name, parameter in partition.parameters.local().items()
        if id(parameter) in norms and counts(partition, name) and among(name)
    ]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in counted]).square().sum()


def global_norm(partition: Partition, optimizer: Optimizer, device: torch.device) -> Tensor:
    """Returns the 2-norm over all gradients of `optimizer`, on all ranks of a replica. Collective over the replica."""
    square = local_square(partition, norms_by_id(optimizer), device)
    return _sum_over_model(partition, square).sqrt()


def gradient_norms(partition: Partition, device: torch.device) -> dict[str, Tensor]:
    """Returns the 2-norm of each parameter's gradient, and of all gradients. Collective over a replica of `dp`."""
    names, local = partition.parameters.names, partition.parameters.local()
    with_gradient = [n for n in names if n in local and local[n].grad is not None]
    norms = dict(zip(with_gradient, local_norms([local[n].grad for n in with_gradient]), strict=True))  # type: ignore[misc]
    squares = torch.zeros(len(names), 2, dtype=torch.float64, device=device)  # and 1 if there is a gradient
    for i, name in enumerate(names):
        if name in norms:
            squares[i, 0] = norms[name].double().square() * counts(partition, name)
            squares[i, 1] = 1
    there = _sum_over_model(partition, squares)[:, 1].tolist()
    found = {f"{PREFIX}/{n}": squares[i, 0].sqrt().float() for i, n in enumerate(names) if there[i]}
    return found | ({f"{PREFIX}_total": squares[:, 0].sum().sqrt().float()} if found else {})


def counts(partition: Partition, name: str) -> bool:
    """Returns True if this rank counts its part of `name`: one of the ranks of a `dp` replica with the same part."""
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
    """Sums `values` in place over the ranks of this rank's replica of `dp`."""
    for axis in AXES:
        if getattr(partition.plan.layout, axis) > 1:
            dist.all_reduce(values, group=partition.mesh.group(axis))
    return values
