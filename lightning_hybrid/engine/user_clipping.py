"""torch's functions for norms and clipping, called by the user on gradients of which each rank has a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._torch_private import clipping_functions, replaced_clipping_functions
from lightning_hybrid.collectives import to_local
from lightning_hybrid.engine.norms import AXES, counts
from lightning_hybrid.parallelize.apply import Partition

_GradientsOf = Tensor | Iterable[Tensor]


@contextmanager
def clipping_of_parts(partition: Partition, device: torch.device) -> Iterator[None]:
    """Makes `torch.nn.utils.clip_grad_norm_`, `clip_grad_value_` and `get_total_norm` work on the whole gradients.

    All ranks of a replica must call them alike, as code of the user does.

    Args:
        partition: The applied partition.
        device: This rank's device.
    """
    layout = partition.plan.layout
    if layout.devices == layout.dp:
        yield
        return
    total_norm, _, _ = clipping_functions()

    def get_total_norm(
        tensors: _GradientsOf, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        found = _listed(tensors)
        names = _names(partition)
        if found and not any(id(t) in names for t in found):
            return total_norm(found, norm_type, error_if_nonfinite, foreach)
        norm = _total_norm(partition, [(names.get(id(t)), t) for t in found], float(norm_type), device)
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped."
            )
        return norm

    def clip_grads_with_norm_(
        parameters: _GradientsOf, max_norm: float, total_norm: Tensor, foreach: bool | None = None
    ) -> None:
        factor = torch.clamp(float(max_norm) / (total_norm + 1e-6), max=1.0)
        _change(parameters, lambda gradient: gradient.mul_(factor.to(gradient.device)))

    def clip_grad_value_(parameters: _GradientsOf, clip_value: float, foreach: bool | None = None) -> None:
        _change(parameters, lambda gradient: gradient.clamp_(-float(clip_value), float(clip_value)))

    with replaced_clipping_functions(get_total_norm, clip_grads_with_norm_, clip_grad_value_):
        yield


def _listed(tensors: _GradientsOf) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


@torch.no_grad()
def _change(parameters: _GradientsOf, change: Callable[[Tensor], object]) -> None:
    for parameter in _listed(parameters):
        if parameter.grad is not None:
            change(to_local(parameter.grad))


def _names(partition: Partition) -> dict[int, str]:
    """Returns the names of this rank's parts of parameters, by the `id` of the parameter and of its gradient."""
    if partition.shows_whole:
        return {}
    local = partition.parameters.local()
    names = {id(p): n for n, p in local.items()}
    return names | {id(p.grad): n for n, p in local.items() if p.grad is not None}


@torch.no_grad()
def _total_norm(
    partition: Partition, tensors: list[tuple[str | None, Tensor]], order: float, device: torch.device
) -> Tensor:
    """Returns the norm of order `order` over the whole of `tensors`. Collective over the ranks of a replica of `dp`.

    Args:
        partition: The applied partition.
        tensors: This rank's parts, each with the name of its parameter; None for another tensor, equal on all ranks.
        order: The order of the norm, or infinity.
        device: This rank's device.
    """
    place = partition.mesh.place
    first = place.pp == place.fsdp == place.ep == place.tp == 0
    own = [to_local(t) for name, t in tensors if (first if name is None else counts(partition, name))]
    norms = [torch.linalg.vector_norm(t, order, dtype=torch.float64).to(device) for t in own if t.numel()]
    largest = order == float("inf")
    powers = [norm if largest else norm**order for norm in norms]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if powers:
        total = torch.stack(powers).max() if largest else torch.stack(powers).sum()
    for axis in AXES:
        if getattr(partition.plan.layout, axis) > 1:
            op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            dist.all_reduce(total, op=op, group=partition.mesh.group(axis))
    return (total if largest else total ** (1 / order)).float()
