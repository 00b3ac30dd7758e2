"""Private APIs of process groups, their store and their collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup, FakeWork
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
    """Returns the handle of a finished collective, boxed as the operators of `c10d` return it."""
    return FakeWork().boxed()


def boxed_group(box: Any) -> dist.ProcessGroup:
    """Returns the process group in `box`, as operators of `c10d` receive it."""
    return dist.ProcessGroup.unbox(box)


def all_to_all_rows(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends rows of `rows` to every rank and returns those that arrive, in order of rank; gradients are sent back.

    torch 2.13 recommends this function in its warning about `torch.distributed.nn.functional`.

    Args:
        rows: Shape `(sum(sent), ...)`; the first rows are for the first rank.
        sent: Number of rows for each rank.
        received: Number of rows from each rank.
        group: The process group of the ranks.
    """
    return functional.wait_tensor(functional.all_to_all_single_autograd(rows, received, sent, group))


def sum_over_group(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the sum of every rank's `tensor`; its gradient is the sum of the gradients of all ranks."""
    return functional.wait_tensor(functional.all_reduce(tensor, "sum", group))


@contextmanager
def fake_backends() -> Iterator[list[dist.ProcessGroup]]:
    """Replaces the backends of all process groups by torch's `FakeProcessGroup`, and registers them again at the end.

    Collectives then return without any peer. Outputs made of all ranks' inputs get copies of this rank's input; receive
    buffers are not written. Afterwards a group keeps its fake backend, for no device: nothing calls the fake backend
    but `ProcessGroup.set_timeout`, which fails before torch 2.14.

    Yields:
        The groups.

    Raises:
        NotImplementedError: If a group is created in the context, which needs all ranks of the group, or if a group has
            no backend that can be replaced.
    """
    module: Any = dist.distributed_c10d
    kinds = dist.ProcessGroup.BackendType
    make_group, groups = module._new_process_group_helper, list(module._world.pg_map)

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("A process group cannot be made while a rank runs without the others.")

    with ExitStack() as stack:
        for group in groups:
            name, description, bound = group.group_name, group.group_desc, group.bound_device_id
            if not group._device_types:
                raise NotImplementedError(f"Process group {name!r} has no backend that can be replaced.")
            fake: Any = FakeProcessGroup._create_internal(group.rank(), group.size())
            stack.callback(setattr, group, "bound_device_id", bound)
            group.bound_device_id = None  # on which all fake backends of a group must agree
            for device in group._device_types:
                real: Any = group._get_backend(device)
                kind = dist.Backend.backend_type_map.get(real.name(), kinds.CUSTOM)
                stack.callback(group._register_backend, device, kind, real)
                group._register_backend(device, kinds.UNDEFINED, fake)
            group._set_group_name(name)  # a group's name is that of its backend
            group._set_group_desc(description)
        stack.callback(setattr, module, "_new_process_group_helper", make_group)
        module._new_process_group_helper = refuse
        yield groups
