"""Resharding: sends parts of tensors to the ranks that hold them in the new layout, unless a rank has them already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.collectives import on_all_ranks
from lightning_hybrid.reshard.local_state import Key
from lightning_hybrid.reshard.transfer import Transfer, transfers
from lightning_hybrid.spec.tensor_index import Index, overlaps

ROUND_BYTES = 256 * 2**20
"""Bytes that all ranks together send per round: the memory that resharding needs besides the parts of both layouts."""

Places = Callable[[Key], tuple[Index | None, ...]]


def exchange(
    parts: Mapping[Key, Tensor],
    dtypes: Mapping[Key, torch.dtype],
    before: Places,
    after: Places,
    target: Callable[[Key], Tensor | None],
) -> int:
    """Fills the new parts of all ranks. Collective.

    Args:
        parts: This rank's old parts, which are not changed.
        dtypes: Dtypes of all tensors, in the same order on all ranks.
        before: Returns the old part of a tensor on each rank.
        after: Returns the new part of a tensor on each rank.
        target: Returns this rank's new part of a tensor, to be filled; None if this rank has no new part.

    Returns:
        Bytes sent by all ranks together.

    Raises:
        PartitionError: On all ranks, if any rank could not prepare a round.
    """
    rank, sent = dist.get_rank(), 0
    for dtype, keys in groupby(sorted(dtypes, key=lambda k: str(dtypes[k])), key=lambda k: dtypes[k]):
        for steps in _rounds(list(keys), dtype.itemsize, before, after):
            send = on_all_ranks(lambda s=steps, d=dtype: _prepare_round(rank, s, d, parts, before, after, target))
            send()
            sent += sum(s.count * dtype.itemsize for _, of_key in steps for s in of_key if s.source != s.target)
    return sent


_Steps = list[tuple[Key, tuple[Transfer, ...]]]


def _rounds(keys: list[Key], itemsize: int, before: Places, after: Places) -> Iterator[_Steps]:
    chosen: _Steps = []
    size = 0
    for key in keys:
        steps = transfers(before(key), after(key))
        moved = sum(s.count for s in steps if s.source != s.target) * itemsize
        if chosen and size + moved > ROUND_BYTES:
            yield chosen
            chosen, size = [], 0
        chosen.append((key, steps))
        size += moved
    if chosen:
        yield chosen


def _prepare_round(
    rank: int,
    steps: _Steps,
    dtype: torch.dtype,
    parts: Mapping[Key, Tensor],
    before: Places,
    after: Places,
    target: Callable[[Key], Tensor | None],
) -> Callable[[], None]:
    """Copies elements that stay on this rank; returns the collective call that moves the other elements."""
    ranks = dist.get_world_size()
    outgoing: list[list[Tensor]] = [[] for _ in range(ranks)]
    incoming: list[list[Tensor]] = [[] for _ in range(ranks)]
    anything = False
    device = None
    for key, of_key in steps:
        new = target(key)
        device = device if new is None else new.device
        for step in of_key:
            anything = anything or step.source != step.target
            if step.source == rank:
                values = _box(parts[key], before(key)[rank], step.box)
                if step.target == rank and new is not None:
                    _box(new, after(key)[rank], step.box).copy_(values)
                else:
                    outgoing[step.target].append(values)
                    device = values.device
            elif step.target == rank and new is not None:
                incoming[step.source].append(_box(new, after(key)[rank], step.box))
    if not anything:
        return lambda: None
    return partial(_send, outgoing, incoming, dtype, device or torch.device("cpu"))


def _send(outgoing: list[list[Tensor]], incoming: list[list[Tensor]], dtype: torch.dtype, device: torch.device) -> None:
    flat = [t.reshape(-1) for of_rank in outgoing for t in of_rank]
    out = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
    sizes_out, sizes_in = ([sum(t.numel() for t in of_rank) for of_rank in way] for way in (outgoing, incoming))
    arrived = torch.empty(sum(sizes_in), dtype=dtype, device=device)
    item = dtype.itemsize
    # as bytes: not every backend sends every type
    dist.all_to_all_single(
        arrived.view(torch.uint8), out.view(torch.uint8), [n * item for n in sizes_in], [n * item for n in sizes_out]
    )
    offset = 0
    for of_rank in incoming:
        for box in of_rank:
            box.copy_(arrived[offset : offset + box.numel()].view(box.shape))
            offset += box.numel()


def _box(part: Tensor, index: Index | None, box: Index) -> Tensor:
    """Returns the elements of a box of the whole tensor, as a view of a rank's part."""
    if index is None:
        raise ValueError(f"This rank has no part with {box}.")
    (found,) = overlaps(index, box)
    return part[found.target]
