"""Kinds of gradient reduction over replicas: exact, in bfloat16 on the wire, or hierarchical.

`ReplicaReducer` passes whole buckets to a `Reduction`; `fully_shard` uses a custom reduce-scatter instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._torch_private import ReduceScatter
from lightning_hybrid.collectives import all_gather_single, reduce_scatter_single

Finish = Callable[[], None]
"""Waits for a started reduction; the tensor then contains the sum."""


class Reduction(Protocol):
    """Sums a tensor over a group of ranks."""

    def begin(self, flat: Tensor, group: dist.ProcessGroup) -> Finish:
        """Starts to sum `flat`, of shape `(elements,)`, in place; all ranks start and finish in the same order."""
        ...

    def sent_bytes(self, elements: int, itemsize: int, ranks: int) -> float:
        """Returns the bytes that a rank sends for a tensor of `elements` elements of `itemsize` bytes."""
        ...


def _ring_bytes(elements: int, itemsize: int, ranks: int) -> float:
    """Returns the bytes that a rank sends in a ring all-reduce: 2 (n - 1) / n of the tensor, with n = `ranks`."""
    return 2 * (ranks - 1) / ranks * elements * itemsize


class Exact:
    """Sums in the gradients' dtype, by the backend's all-reduce."""

    def begin(self, flat: Tensor, group: dist.ProcessGroup) -> Finish:
        """See `Reduction`."""
        work: Any = dist.all_reduce(flat, group=group, async_op=True)
        return work.wait

    def sent_bytes(self, elements: int, itemsize: int, ranks: int) -> float:
        """See `Reduction`."""
        return _ring_bytes(elements, itemsize, ranks)


class InBfloat16:
    """Sends and sums in bfloat16: half of the bytes, with an error that grows with the number of ranks."""

    def begin(self, flat: Tensor, group: dist.ProcessGroup) -> Finish:
        """See `Reduction`."""
        short = flat.bfloat16()
        work: Any = dist.all_reduce(short, group=group, async_op=True)

        def finish() -> None:
            work.wait()
            flat.copy_(short)

        return finish

    def sent_bytes(self, elements: int, itemsize: int, ranks: int) -> float:
        """See `Reduction`."""
        return _ring_bytes(elements, 2, ranks)


class InBfloat16AddedExactly:
    """Sends in bfloat16 and sums each rank's share in float32: the same bytes, with an error that does not grow."""

    def begin(self, flat: Tensor, group: dist.ProcessGroup) -> Finish:
        """See `Reduction`."""
        ranks = group.size()
        short = torch.zeros(-(-len(flat) // ranks) * ranks, dtype=torch.bfloat16, device=flat.device)
        short[: len(flat)] = flat
        arrived = torch.empty_like(short)
        work: Any = dist.all_to_all_single(_bytes(arrived), _bytes(short), group=group, async_op=True)

        def finish() -> None:
            work.wait()
            own = arrived.view(ranks, -1).sum(0, dtype=torch.float32).bfloat16()
            all_gather_single(_bytes(short), _bytes(own), group=group)
            flat.copy_(short[: len(flat)])

        return finish

    def sent_bytes(self, elements: int, itemsize: int, ranks: int) -> float:
        """See `Reduction`."""
        return _ring_bytes(elements, 2, ranks)


class Hierarchical:
    """Reduce-scatter within a node, all-reduce of each part across nodes, all-gather within the node.

    The slow network between nodes carries 1 / inner of what a flat ring would send over it.

    Args:
        near: The ranks of this node.
        far: The ranks with the same position in each node.
    """

    def __init__(self, near: dist.ProcessGroup, far: dist.ProcessGroup) -> None:
        self._near, self._far = near, far

    def begin(self, flat: Tensor, group: dist.ProcessGroup) -> Finish:
        """See `Reduction`."""
        near, far = self._near, self._far
        ranks = near.size()
        padded = torch.zeros(-(-len(flat) // ranks) * ranks, dtype=flat.dtype, device=flat.device)
        padded[: len(flat)] = flat
        own = torch.empty(len(padded) // ranks, dtype=flat.dtype, device=flat.device)
        work: Any = reduce_scatter_single(own, padded, group=near, async_op=True)

        def finish() -> None:
            work.wait()
            dist.all_reduce(own, group=far)
            all_gather_single(padded, own, group=near)
            flat.copy_(padded[: len(flat)])

        return finish

    def sent_bytes(self, elements: int, itemsize: int, ranks: int) -> float:
        """See `Reduction`; within and between nodes together."""
        return _ring_bytes(elements, itemsize, ranks)


class ShardedInBfloat16(ReduceScatter):
    """Reduce-scatter for `fully_shard` with gradients sent in bfloat16.

    Args:
        added_exactly: True to sum in float32.
    """

    def __init__(self, added_exactly: bool) -> None:
        self._added_exactly = added_exactly

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a buffer for one call."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Scatters the sum or the mean of `input_tensor` to `output_tensor`."""
        short = input_tensor.bfloat16()
        if self._added_exactly:
            arrived = torch.empty_like(short)
            dist.all_to_all_single(_bytes(arrived), _bytes(short), group=group)
            output_tensor.copy_(arrived.view(group.size(), -1).sum(0, dtype=torch.float32))
        else:
            own = torch.empty(output_tensor.shape, dtype=torch.bfloat16, device=short.device)
            reduce_scatter_single(own, short, group=group)
            output_tensor.copy_(own)
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()
        return None


def _bytes(tensor: Tensor) -> Tensor:
    """Returns a view of the memory as bytes, since not every backend sends every dtype."""
    return tensor.view(torch.uint8)
