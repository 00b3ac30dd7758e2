"""Surrounds the collectives of `torch.distributed` that return when they are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

from lightning_hybrid.patching import patched

_NAMES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "broadcast_object_list",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


@contextmanager
def timed_collectives(around: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Surrounds each call of a collective of `torch.distributed` by `around()`, except asynchronous ones."""

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def run(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("async_op"):
                return collective(*args, **kwargs)
            with around():
                return collective(*args, **kwargs)

        return run

    with patched(dist, **{name: timed(getattr(dist, name)) for name in _NAMES if hasattr(dist, name)}):
        yield
