"""Refuses collectives that the user's code calls itself where they would not span the replicas.

Ranks of `tp` hold copies of the same samples, and ranks of `pp` run parts of the same step. A sum or a list over all
ranks then counts each sample several times, and a collective inside of a step of a pipeline is reached by some ranks
only. `self.all_gather` and `strategy.reduce` span the replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lightning_hybrid._torch_private import is_users_collective, user_location
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

_GATHERS = ("allgather", "_allgather_base", "all_gather_single", "allgather_coalesced", "gather")
_SUMS = (
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "_reduce_scatter_base",
)
_COPIES = ("broadcast", "scatter", "alltoall", "alltoall_base", "all_to_all_single", "barrier", "monitored_barrier")


@contextmanager
def refused_collectives(
    layout: Callable[[], Layout], in_step: Callable[[], bool], allowed: Callable[[], bool]
) -> Iterator[None]:
    """Refuses sums and gathers of the user's code over all ranks, and any collective in a step of a pipeline.

    Args:
        layout: Returns the present layout.
        in_step: Returns True while a step of the user runs, also in a dry run.
        allowed: Returns False while all collectives are refused.

    Raises:
        PartitionError: At the call of the user, on each rank that makes it.
    """
    kind: Any = dist.ProcessGroup
    originals = {name: vars(kind)[name] for name in (*_GATHERS, *_SUMS, *_COPIES) if name in vars(kind)}
    for name, original in originals.items():
        setattr(kind, name, _checked(name, original, layout, in_step, allowed))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(kind, name, original)


def _checked(
    name: str, original: Any, layout: Callable[[], Layout], in_step: Callable[[], bool], allowed: Callable[[], bool]
) -> Callable:
    call = original.__get__(None, dist.ProcessGroup)

    def checked(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        if not allowed() and is_users_collective():
            raise PartitionError(f"{user_location()} communicates by `torch.distributed` ({name})")
        axes = [axis for axis in ("tp", "pp") if getattr(layout(), axis) > 1]
        on_one_stage = "pp" in axes and in_step()
        counts_copies = bool(axes) and group is dist.group.WORLD and _sums_or_gathers(name, args)
        if (on_one_stage or counts_copies) and is_users_collective():
            raise PartitionError(_message(name, layout(), axes))
        return call(group, *args, **kwargs)

    return checked


def _sums_or_gathers(name: str, args: tuple) -> bool:
    if name in _GATHERS:
        return True
    operation = getattr(args[-1], "reduceOp", dist.ReduceOp.SUM) if args else dist.ReduceOp.SUM
    # a `ReduceOp` equals its kind, but not the other way round, which `in` would ask
    return name in _SUMS and any(operation == kind for kind in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT))


def _message(name: str, layout: Layout, axes: list[str]) -> str:
    named = " and ".join(f"`{axis}`" for axis in axes)
    return (
        f"{user_location()} communicates by `torch.distributed` ({name}), and under `layout='{layout}'` "
        f"ranks of {named} hold copies or parts of the same samples, so the result would not be that of the replicas. "
        "Use `self.all_gather` or `trainer.strategy.reduce`, which span the replicas, or "
        f"`layout='{layout.moved('pp', 'dp').moved('tp', 'dp')}'`."
    )
