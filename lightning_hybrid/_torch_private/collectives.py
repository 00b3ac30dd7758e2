"""Private APIs of process groups, their store and their collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._C._distributed_c10d import _resolve_process_group as resolve_process_group
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh


def default_group() -> dist.ProcessGroup:
    """Returns the process group of all ranks."""
    return dist.distributed_c10d._get_default_group()


def store_client() -> Any:
    """Returns a new connection to the store of the rendezvous, independent of the process groups' threads."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Returns the mesh of one axis `name` with all ranks of `mesh`."""
    return mesh._flatten(name)


def limit_waiting(timeout: timedelta) -> None:
    """Sets the timeout of collectives of all groups of this process to `timeout`; torch's default is 30 minutes."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def completed_work() -> Any:
    """Returns the handle of a completed collective, boxed as operators of `c10d` return it."""
    return FakeWork().boxed()


def boxed_group(box: Any) -> dist.ProcessGroup:
    """Returns the process group in `box`, as operators of `c10d` are called with it."""
    return dist.ProcessGroup.unbox(box)


def group_named(name: Any) -> dist.ProcessGroup:
    """Returns the process group called `name`, as functional collectives are called; a group is returned as it is."""
    return name if isinstance(name, dist.ProcessGroup) else resolve_process_group(name)


def all_to_all_rows(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends rows of `rows` to every rank and returns those that arrive, in order of rank; gradients go back.

    torch 2.13 names this function in place of `torch.distributed.nn.functional`, which it warns about.

    Args:
        rows: Shape `(sum(sent), ...)`; the first rows are for the first rank.
        sent: Number of rows for each rank.
        received: Number of rows from each rank.
        group: The ranks.
    """
    return functional.wait_tensor(functional.all_to_all_single_autograd(rows, received, sent, group))


def sum_over_group(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the sum of every rank's `tensor`; its gradient is the sum of the gradients of all ranks."""
    return functional.wait_tensor(functional.all_reduce(tensor, "sum", group))


@contextmanager
def coalescing_off() -> Iterator[None]:
    """Runs collectives that would be coalesced as separate operators, which a `DispatchMode` sees.

    Backends that coalesce (NCCL) start and end a coalesced call without an operator.
    """
    module: Any = dist.distributed_c10d
    kept = module._coalescing_manager

    @contextmanager
    def manager(*_: Any, **__: Any) -> Iterator[Any]:
        yield module._CoalescingManager()

    module._coalescing_manager = manager
    try:
        yield
    finally:
        module._coalescing_manager = kept
