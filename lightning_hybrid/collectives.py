"""Collectives of objects that contain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hybrid.spec.errors import PartitionError

T = TypeVar("T")

all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gathers parts into one tensor, by its name since torch 2.13."""
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Adds tensors up and leaves a part on each rank, by its name since torch 2.13."""


def to_host(value: Any) -> Any:
    """Returns `value` with its tensors detached and on the CPU, to be sent as an object."""
    return apply_to_collection(value, Tensor, lambda t: t.detach().cpu())


def to_device(value: Any, device: torch.device) -> Any:
    """Returns `value` with its tensors on `device`."""
    return apply_to_collection(value, Tensor, lambda t: t.to(device))


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns the `value` of every rank of `group` (None: of all), by rank, on these ranks. Collective."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def share_object(value: Any, source: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Returns the `value` of rank `source` on every rank of `group`, with tensors on `device`. Collective."""
    own = dist.get_rank(group) == source
    box = [to_host(value) if own else None]
    dist.broadcast_object_list(box, dist.get_global_rank(group, source), group=group)
    return value if own else to_device(box[0], device)


def to_local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor: Tensor) -> Tensor:
    """Returns the whole of a DTensor; any other tensor unchanged. Collective over the ranks that hold a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_problem(problem: str | None) -> str | None:
    """Returns the first `problem` of any rank that is not None, on all ranks; None if there is none. Collective."""
    return next((p for p in gather_objects(problem) if p is not None), None)


def on_all_ranks(step: Callable[[], T]) -> T:
    """Runs `step`; if it raises on any rank, raises on all ranks. Collective.

    Raises:
        PartitionError: With the first rank's error.
    """
    problem, out = None, None
    try:
        out = step()
    except Exception as error:  # noqa: BLE001 -- raised on all ranks below
        problem = error_message(error)
    problem = first_problem(problem)
    if problem is not None:
        raise PartitionError(problem)
    return out  # type: ignore[return-value] -- there was no error


def error_message(error: Exception) -> str:
    """Returns the message of an error, with the class of the error unless it is a `PartitionError`."""
    return str(error) if isinstance(error, PartitionError) else f"{type(error).__name__}: {error}"
