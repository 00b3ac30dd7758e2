"""A batch of any size, made of the samples of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_hybrid.execute.batches import count_samples


def tiled(batch: Any, size: int) -> Any:
    """A batch of `size` samples: those of `batch` in order, again and again.

    Tensors and lists with one element a sample are tiled along dimension 0; everything else stays as it is.

    Args:
        batch: A batch of any nested structure.
        size: Samples of the result.

    Raises:
        ValueError: If the tensors do not agree on the number of samples, or there are none.
    """
    sizes: set[int] = set()
    apply_to_collection(batch, Tensor, lambda t: sizes.add(t.shape[0]) if t.ndim else None)
    if len(sizes) != 1 or 0 in sizes:
        found = f"tensors with first dimensions {sorted(sizes)}" if sizes else "no tensor"
        raise ValueError(
            "`batch`: a memory probe makes batches of other sizes from the first one, along dimension 0, so its "
            f"tensors must agree on its size. Got {found}. Put the samples on dimension 0, or give the micro-batch "
            "size yourself."
        )
    count = count_samples(batch)
    return _rows(batch, count, torch.arange(size) % count)


def _rows(value: Any, count: int, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device)) if value.ndim else value
    if isinstance(value, list | tuple) and len(value) == count and not any(_nested(v) for v in value):
        return type(value)(value[i] for i in index.tolist())
    if isinstance(value, Mapping):
        kind: Any = type(value)  # a dict, or for example the BatchEncoding of transformers
        return kind({k: _rows(v, count, index) for k, v in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rows(v, count, index) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_rows(v, count, index) for v in value)
    return apply_to_collection(value, Tensor, lambda t: _rows(t, count, index))  # dataclasses


def _nested(value: Any) -> bool:
    return isinstance(value, Tensor | list | tuple | Mapping)
