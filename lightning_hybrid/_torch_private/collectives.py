"""Private APIs of process groups, their store and their collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._C._distributed_c10d import _resolve_process_group as resolve_process_group


def default_group() -> dist.ProcessGroup:
    """The process group of all ranks."""
    return dist.distributed_c10d._get_default_group()


def store_client() -> Any:
    """A connection of its own to the store with which the ranks met, to be used beside the process groups' threads."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def limit_waiting(timeout: timedelta) -> None:
    """Collectives of all groups of this process wait so long; groups that are made without a time-out wait 30 min."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def completed_work() -> Any:
    """The handle of a collective that is done, in the box in which operators return it."""
    return FakeWork().boxed()


def boxed_group(box: Any) -> dist.ProcessGroup:
    """The process group in the box in which operators of `c10d` take it."""
    return dist.ProcessGroup.unbox(box)


def group_named(name: Any) -> dist.ProcessGroup:
    """The process group that functional collectives take by name, or itself."""
    return name if isinstance(name, dist.ProcessGroup) else resolve_process_group(name)


@contextmanager
def coalescing_off() -> Iterator[None]:
    """Inside, collectives that would be started together are operators of their own, which a `DispatchMode` sees.

    Backends that coalesce (NCCL) are told so without an operator.
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
