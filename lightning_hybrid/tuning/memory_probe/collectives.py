"""Local stand-ins for collectives: a rank runs a whole step with no peer.

Every operator of `c10d` and of the functional collectives is replaced below autograd by one that gives a tensor of the
same shape, as if all other ranks had sent what this one has, and a handle that is done already. What can only come from
another rank (a pipeline's activations) becomes random numbers between -1 and 1, or ones where it isn't floating-point:
a valid index, a mask that hides nothing, and the vote of pipeline stages for shapes that are known beforehand.

Sizes that ranks tell each other are so those of this rank: as many tokens arrive at its experts as it sends away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._torch_private import (
    DispatchMode,
    boxed_group,
    coalescing_off,
    completed_work,
    group_named,
    wrap_others,
)

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem")
_NO_COLLECTIVES = ("c10d::check_for_nan", "_c10d_functional::_wrap_tensor_autograd", "_dtensor::mesh_get_process_group")
_SEED = 0


class UnknownCollectiveError(NotImplementedError):
    """A collective for which there is no local stand-in."""


@contextmanager
def without_peers() -> Iterator[None]:
    """Inside, collectives of this rank need no other rank."""
    with coalescing_off(), _StandIns():
        yield


class _StandIns(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if wrap_others(types):  # DTensors, ghosts: they come back here with the plain tensors inside
            return NotImplemented
        name = func.name()
        if func.namespace not in _NAMESPACES or name in _NO_COLLECTIVES:
            return func(*args, **(kwargs or {}))
        namespace, operator = name.replace("_functional_autograd::", "_functional::").split("::")
        table = _BOXED if namespace == "c10d" else _FUNCTIONAL
        if operator not in table:
            raise UnknownCollectiveError(
                f"A memory probe runs without the other ranks, and has no stand-in for the collective `{name}`. Give "
                "the microbatch size yourself instead of having it searched for."
            )
        return table[operator](self, *args, **(kwargs or {}))

    def invent(self, tensor: Tensor) -> None:
        """Writes what only another rank would know."""
        if not tensor.is_floating_point():
            tensor.fill_(1)
            return
        if tensor.device not in self._generators:
            self._generators[tensor.device] = torch.Generator(tensor.device).manual_seed(_SEED)
        if tensor.dtype.itemsize == 1:  # float8 has no random numbers
            tensor.zero_()
        else:
            tensor.uniform_(-1, 1, generator=self._generators[tensor.device])


def _repeat_into(target: Tensor, source: Tensor) -> None:
    """Fills `target` with the elements of `source` in order, from the start again where they end."""
    flat, rest = source.reshape(-1), target.numel()
    if not rest:
        return
    if not flat.numel():
        target.zero_()
        return
    view = target.view(-1) if target.is_contiguous() else torch.empty_like(target).view(-1)
    whole = rest // flat.numel()
    if view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
        for part in view[: whole * flat.numel()].split(flat.numel()):
            if part.data_ptr() != flat.data_ptr():  # FSDP gathers into the buffer that its own part is in
                part.copy_(flat)
    elif whole:
        view[: whole * flat.numel()].view(whole, -1).copy_(flat)
    if rest % flat.numel():
        view[whole * flat.numel() :].copy_(flat[: rest % flat.numel()])
    if not target.is_contiguous():
        target.copy_(view.view(target.shape))


def _take_share(target: Tensor, source: Tensor, rank: int) -> None:
    """Writes the part of `source` that belongs to `rank`."""
    count = target.numel()
    target.copy_(source.reshape(-1)[rank * count : (rank + 1) * count].view(target.shape))


# ---- operators of c10d: they write into tensors and return a handle, most with the tensors

_ALONE = Callable[..., Any]


def _unchanged(_: _StandIns, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    return tensors, completed_work()


def _only_work(_: _StandIns, *args: Any, **kwargs: Any) -> Any:
    return completed_work()


def _broadcast(mode: _StandIns, tensors: Sequence[Tensor], group: Any, root: int, *args: Any) -> Any:
    if boxed_group(group).rank() != root:
        for tensor in tensors:
            mode.invent(tensor)
    return tensors, completed_work()


def _receive(mode: _StandIns, tensors: Sequence[Tensor], *args: Any) -> Any:
    for tensor in tensors:
        mode.invent(tensor)
    return completed_work()


def _all_gather(_: _StandIns, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], *args: Any) -> Any:
    _gather_lists(outputs, inputs)
    return outputs, completed_work()


def _all_gather_coalesced(_: _StandIns, outputs: Any, inputs: Sequence[Tensor], *args: Any) -> Any:
    for target_list in outputs:  # one list a rank, one tensor an input
        for target, source in zip(target_list, inputs, strict=True):
            _repeat_into(target, source)
    return completed_work()


def _gather(_: _StandIns, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], *args: Any) -> Any:
    _gather_lists(outputs, inputs)
    return completed_work()


def _gather_lists(outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
    for targets, source in zip(outputs, inputs, strict=False):  # none where this rank isn't the root
        for target in targets:
            _repeat_into(target, source)


def _all_gather_base(_: _StandIns, output: Tensor, source: Tensor, *args: Any) -> Any:
    _repeat_into(output, source)
    return output, completed_work()


def _all_gather_tensors(_: _StandIns, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *args: Any) -> Any:
    for target, source in zip(outputs, inputs, strict=True):
        _repeat_into(target, source)
    return completed_work()


def _scatter(mode: _StandIns, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], *args: Any) -> Any:
    if not inputs:  # this rank isn't the root
        for tensor in outputs:
            mode.invent(tensor)
    for target, sources in zip(outputs, inputs, strict=False):
        target.copy_(sources[boxed_group(args[0]).rank()])
    return outputs, completed_work()


def _reduce_scatter(_: _StandIns, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], *args: Any) -> Any:
    for target, sources in zip(outputs, inputs, strict=True):
        target.copy_(sources[boxed_group(args[0]).rank()])
    return outputs, completed_work()


def _reduce_scatter_base(_: _StandIns, output: Tensor, source: Tensor, group: Any, *args: Any) -> Any:
    _take_share(output, source, boxed_group(group).rank())
    return output, completed_work()


def _reduce_scatter_tensors(
    _: _StandIns, outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Any, *args: Any
) -> Any:
    for target, source in zip(outputs, inputs, strict=True):
        _take_share(target, source, boxed_group(group).rank())
    return completed_work()


def _all_to_all(_: _StandIns, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *args: Any) -> Any:
    for target, source in zip(outputs, inputs, strict=True):
        _repeat_into(target, source)
    return outputs, completed_work()


def _all_to_all_base(_: _StandIns, output: Tensor, source: Tensor, *args: Any) -> Any:
    _repeat_into(output, source)
    return completed_work()


def _nothing(_: _StandIns, *args: Any, **kwargs: Any) -> None:
    return None


_BOXED: dict[str, _ALONE] = {
    "allreduce_": _unchanged,
    "allreduce_coalesced_": _only_work,
    "reduce_": _only_work,
    "broadcast_": _broadcast,
    "allgather_": _all_gather,
    "allgather_coalesced_": _all_gather_coalesced,
    "_allgather_base_": _all_gather_base,
    "allgather_into_tensor_coalesced_": _all_gather_tensors,
    "reduce_scatter_": _reduce_scatter,
    "_reduce_scatter_base_": _reduce_scatter_base,
    "reduce_scatter_tensor_coalesced_": _reduce_scatter_tensors,
    "gather_": _gather,
    "scatter_": _scatter,
    "alltoall_": _all_to_all,
    "alltoall_base_": _all_to_all_base,
    "send": _only_work,
    "recv_": _receive,
    "recv_any_source_": _receive,
    "barrier": _only_work,
    "monitored_barrier_": _nothing,
}


# ---- functional collectives: they return new tensors, or the tensor of an operator that ends with `_` or `_out`


def _copied(_: _StandIns, source: Tensor, *args: Any) -> Tensor:
    return source.clone()


def _same(_: _StandIns, source: Any, *args: Any) -> Any:
    return source


def _copied_list(_: _StandIns, sources: Sequence[Tensor], *args: Any) -> list[Tensor]:
    return [source.clone() for source in sources]


def _functional_broadcast(mode: _StandIns, source: Tensor, root: int, group: Any) -> Tensor:
    return _functional_broadcast_(mode, source.clone(), root, group)


def _functional_broadcast_(mode: _StandIns, tensor: Tensor, root: int, group: Any) -> Tensor:
    if group_named(group).rank() != root:
        mode.invent(tensor)
    return tensor


def _gathered(_: _StandIns, source: Tensor, count: int, *args: Any) -> Tensor:
    out = source.new_empty((source.shape[0] * count, *source.shape[1:]))
    _repeat_into(out, source)
    return out


def _gathered_list(mode: _StandIns, sources: Sequence[Tensor], count: int, *args: Any) -> list[Tensor]:
    return [_gathered(mode, source, count) for source in sources]


def _gathered_out(_: _StandIns, source: Tensor, count: int, group: Any, *, out: Tensor) -> Tensor:
    _repeat_into(out, source)
    return out


def _scattered(_: _StandIns, source: Tensor, reduce_op: str, count: int, group: Any) -> Tensor:
    return source.chunk(count)[group_named(group).rank()].clone()


def _scattered_list(mode: _StandIns, sources: Sequence[Tensor], reduce_op: str, count: int, group: Any) -> list[Tensor]:
    return [_scattered(mode, source, reduce_op, count, group) for source in sources]


def _scattered_out(_: _StandIns, source: Tensor, reduce_op: str, count: int, group: Any, *, out: Tensor) -> Tensor:
    _take_share(out, source, group_named(group).rank())
    return out


def _exchanged(_: _StandIns, source: Tensor, output_sizes: Sequence[int], *args: Any) -> Tensor:
    out = source.new_empty((sum(output_sizes), *source.shape[1:]))
    _repeat_into(out, source)
    return out


def _exchanged_dims(_: _StandIns, source: Tensor, gather_dim: int, shard_dim: int, group: Any) -> Tensor:
    members: dist.ProcessGroup = group_named(group)
    whole = torch.cat([source] * members.size(), gather_dim)
    return whole.chunk(members.size(), shard_dim)[members.rank()].contiguous()


def _received(mode: _StandIns, tensor: Tensor, *args: Any) -> Tensor:
    mode.invent(tensor)
    return tensor


def _batch(mode: _StandIns, kinds: Sequence[str], peers: Any, tags: Any, tensors: Sequence[Tensor], group: Any) -> Any:
    for kind, tensor in zip(kinds, tensors, strict=True):
        if kind == "irecv":
            mode.invent(tensor)
    return list(tensors)


_FUNCTIONAL: dict[str, _ALONE] = {
    "wait_tensor": _same,
    "all_reduce": _copied,
    "all_reduce_": _same,
    "all_reduce_coalesced": _copied_list,
    "all_reduce_coalesced_": _same,
    "broadcast": _functional_broadcast,
    "broadcast_": _functional_broadcast_,
    "all_gather_into_tensor": _gathered,
    "all_gather_into_tensor_coalesced": _gathered_list,
    "all_gather_into_tensor_out": _gathered_out,
    "reduce_scatter_tensor": _scattered,
    "reduce_scatter_tensor_coalesced": _scattered_list,
    "reduce_scatter_tensor_out": _scattered_out,
    "all_to_all_single": _exchanged,
    "shard_dim_alltoall": _exchanged_dims,
    "isend": _same,
    "irecv": _received,
    "batch_p2p_ops": _batch,
}
