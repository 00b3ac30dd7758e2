"""Collectives of one rank alone: torch's fake process groups, with received values that a step can compute with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._torch_private import (
    DispatchMode,
    boxed_group,
    completed_work,
    fake_backends,
    run_kernel,
    tree_leaves,
    wrap_others,
)

_WRITING = (
    "recv_",
    "recv_any_source_",
    "scatter_",
    # these are written by the fake process group, but only since torch 2.13
    "gather_",
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_",
    "allgather_coalesced_",
)
_SEED = 0


@contextmanager
def without_peers() -> Iterator[None]:
    """Runs collectives of this rank without the other ranks, as if these had sent the values of this rank.

    Sizes that ranks exchange are those of this rank: its experts receive as many tokens as it sends away. Values that
    only another rank has (a pipeline's activations) become random numbers between -1 and 1, or ones where they are not
    floating-point: a valid index, a mask that hides nothing, and the vote of pipeline stages for shapes known
    beforehand.

    Raises:
        NotImplementedError: If a process group has no backend that can be replaced.
    """
    with fake_backends() as groups, _ReceivedValues(groups):
        yield


class _ReceivedValues(DispatchMode):
    """Fills the buffers that a fake process group does not write, and refuses collectives of other groups.

    Args:
        groups: The fake process groups.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        super().__init__()
        self._groups = groups

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if wrap_others(types):  # DTensors, ghosts: they come back here with the plain tensors inside
            return NotImplemented
        namespace, operator = func.name().split("::")
        if namespace in ("_c10d_functional", "_c10d_functional_autograd", "_dtensor"):
            with self:  # made of operators of `c10d`
                return run_kernel(func, args, kwargs or {})
        if namespace == "symm_mem":
            raise _refusal(func)
        if namespace == "c10d" and operator != "check_for_nan":
            return self._collective(operator, func, args)
        return func(*args, **(kwargs or {}))

    def _collective(self, operator: str, func: Any, args: tuple) -> Any:
        group = boxed_group(next(value for value in args if isinstance(value, torch.ScriptObject)))
        if group not in self._groups:
            raise _refusal(func)
        if operator == "monitored_barrier_":  # missing in fake process groups
            return None
        if operator in ("alltoall_", "alltoall_base_"):  # fake process groups refuse sizes that differ
            for target, source in zip(tree_leaves(args[0]), tree_leaves(args[1]), strict=True):
                _repeat(target, source)
            return completed_work() if operator == "alltoall_base_" else (args[0], completed_work())
        if operator in _WRITING or (operator == "broadcast_" and group.rank() != args[2]):
            for tensor in tree_leaves(args[0]):
                _fill(tensor)
        return func(*args)


def _refusal(func: Any) -> NotImplementedError:
    return NotImplementedError(
        f"A memory probe runs without the other ranks, and has no local substitute for `{func.name()}` of this process "
        "group. Set the microbatch size instead of searching for it."
    )


def _fill(tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        tensor.fill_(1)
    elif tensor.dtype.itemsize == 1:  # float8 has no random numbers
        tensor.zero_()
    else:
        tensor.uniform_(-1, 1, generator=torch.Generator(tensor.device).manual_seed(_SEED))


def _repeat(target: Tensor, source: Tensor) -> None:
    """Fills `target` with the elements of `source` in order, repeated as often as needed."""
    if not source.numel():
        _fill(target)
        return
    for part in target.view(-1).split(source.numel()):
        part.copy_(source.reshape(-1)[: part.numel()])
