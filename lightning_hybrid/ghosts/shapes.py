"""Shapes of the results of operators on ghosts, also where they depend on values.

Most operators infer shapes on the meta device, which has no values. An operator that selects by a mask, or packs
sequences by their lengths, needs the values of those arguments, which are real where they are made from the batch: the
mask becomes indices first, and an operator that the meta device does not know runs on zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_hybrid._torch_private import (
    INDEXED,
    PACK_SEQUENCE,
    is_mutable,
    run_on_meta,
    tree_flatten,
    tree_map,
    tree_unflatten,
)

_aten = torch.ops.aten
_SELECTED_BY = {_aten.masked_select: 1, _aten.index: 1, _aten.repeat_interleave: 0, _aten.bincount: 0}
"""The argument whose values decide the shape of the result; all arguments for other operators."""
_KNOWN = {PACK_SEQUENCE: 1}
"""The result that does not depend on ghosts, and is real: the batch sizes of packed sequences."""
_NOT_ON_META = (RuntimeError, NotImplementedError)


def shapes_of_result(
    func: Any, args: tuple, kwargs: dict, ghost: type, unknown: Callable[[], Any]
) -> tuple[Any, tuple, dict]:
    """Returns the result of the operator `func` on meta tensors, and the arguments as meta tensors.

    Args:
        func: The operator.
        args: Arguments; ghosts and real tensors.
        kwargs: Keyword arguments.
        ghost: The class of ghosts, which have `meta`.
        unknown: Called if the shape of the result depends on values of ghosts; raises, or lets an example decide.
    """
    if func.overloadpacket in INDEXED and isinstance(args[1], (list, tuple)):
        args = (args[0], _as_indices(args[1], args[0].device, ghost), *args[2:])

    def to_meta(x: Any) -> Any:
        if isinstance(x, ghost):
            return x.meta  # type: ignore[attr-defined]
        if isinstance(x, torch.device):
            return torch.device("meta")
        if isinstance(x, torch.Tensor) and x.layout != torch.strided:  # torch has no meta kernels of sparse tensors
            return torch.empty(x.shape, dtype=x.dtype, device="meta")
        return x.to("meta") if isinstance(x, torch.Tensor) else x

    flat, spec = tree_flatten((args, kwargs))
    meta_args, meta_kwargs = tree_unflatten([to_meta(x) for x in flat], spec)
    if torch.Tag.dynamic_output_shape in func.tags and _is_dynamic(func, meta_args):
        if _decided_by_ghosts(func, args, kwargs, ghost):
            unknown()
        return _run_on_example(func, args, kwargs, ghost), meta_args, meta_kwargs
    try:
        return run_on_meta(func, meta_args, meta_kwargs), meta_args, meta_kwargs
    except _NOT_ON_META:
        if is_mutable(func):
            raise  # an example would be written to real tensors
        return _run_on_example(func, args, kwargs, ghost), meta_args, meta_kwargs


def _is_dynamic(func: Any, args: tuple) -> bool:
    return func.overloadpacket is not _aten.index or any(_is_mask(x) for x in args[1])


def _is_mask(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)


def _as_indices(indices: Any, device: torch.device, ghost: type) -> list[Any]:
    """Returns `indices` with every real mask replaced by the indices of its non-zero elements, as torch does."""
    found: list[Any] = []
    for index in indices:
        if _is_mask(index) and not isinstance(index, ghost):
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


def _decided_by_ghosts(func: Any, args: tuple, kwargs: dict, ghost: type) -> bool:
    place = _SELECTED_BY.get(func.overloadpacket)
    decisive = (args, kwargs) if place is None or place >= len(args) else args[place]
    if func.overloadpacket is _aten.index:
        decisive = [x for x in args[1] if _is_mask(x)]
    return any(isinstance(x, ghost) for x in tree_flatten(decisive)[0])


def _run_on_example(func: Any, args: tuple, kwargs: dict, ghost: type) -> Any:
    """Runs `func` with examples in place of ghosts; returns the result on the meta device."""
    args, kwargs = tree_map(lambda x: _example(x) if isinstance(x, ghost) else x, (args, kwargs))
    with torch.no_grad():
        out = func(*args, **kwargs)
    known = out[_KNOWN[func.overloadpacket]] if func.overloadpacket in _KNOWN else None
    return tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) and x is not known else x, out)


def _example(ghost: Any) -> torch.Tensor:
    """Returns one value for all elements: a mask that selects everything, or zero, which is an index everywhere."""
    one = torch.ones((), dtype=ghost.dtype, device=ghost.device)
    return (one if ghost.dtype == torch.bool else one * 0).expand(ghost.shape)
