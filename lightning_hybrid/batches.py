"""Counts the samples of batches, and splits batches into microbatches."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_hybrid._torch_private import tree_leaves
from lightning_hybrid.spec.errors import PartitionError


def batch_size(batch: Any) -> int:
    """Returns the number of samples: the size of dimension 0, which must be equal for all tensors with dimensions.

    Raises:
        PartitionError: If sizes differ, or there is no tensor.
    """
    sizes = _first_dims(batch)
    if not sizes or len(set(sizes)) > 1:
        found = f"tensors with first dimensions {sorted(set(sizes))}" if sizes else "no tensor"
        raise PartitionError(
            f"A pipeline splits each batch into microbatches along dimension 0, so the tensors of a batch must agree "
            f"on its size. Got {found}. Put the samples on dimension 0, or set `microbatches=1`."
        )
    return sizes[0]


def count_samples(batch: Any) -> int:
    """Returns the number of samples of the first tensor that has dimensions; 1 if there is none."""
    sizes = _first_dims(batch)
    return sizes[0] if sizes else 1


def count_tokens(batch: Any) -> int | None:
    """Returns the number of elements of a batch's first tensor, such as `input_ids`; None if there is none."""
    return next((leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)


def _first_dims(batch: Any) -> list[int]:
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda t: sizes.append(t.shape[0]) if t.ndim else None)
    return sizes


def split_batch(batch: Any, count: int) -> list[Any]:
    """Splits a batch of any nested structure into `count` equal parts along dimension 0.

    Tensors and lists with one element per sample are split; every part contains all other values whole.
    """
    if count == 1:
        return [batch]
    size = batch_size(batch)
    return [_samples_of(batch, size, slice(i * (size // count), (i + 1) * (size // count))) for i in range(count)]


def copied_batch(batch: Any) -> Any:
    """Returns a copy of a batch, for a run of the step that must not change the batch.

    Objects that cannot be copied are shared with the original.
    """
    try:
        return copy.deepcopy(batch)
    except Exception:  # noqa: BLE001 -- of classes of the user
        return apply_to_collection(batch, Tensor, torch.clone)


def split_sequences(batch: Any, length: int) -> Any:
    """Splits samples of T positions along dim 1 into T / `length` samples; other tensors are unchanged.

    Raises:
        ValueError: If `length` does not divide T, or no tensor has two dims.
    """
    found = next((t.shape[1] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim > 1), None)
    if found is None or found % length:
        what = "no tensor has positions along dim 1" if found is None else f"samples have {found} positions"
        raise ValueError(f"`sequence_length={length}` must divide the length of samples, but {what}.")

    def split(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or tensor.shape[1] != found:
            return tensor
        return tensor.unflatten(1, (-1, length)).flatten(0, 1)

    return apply_to_collection(batch, Tensor, split)


def tiled_batch(batch: Any, size: int) -> Any:
    """Returns a batch of `size` samples that repeats those of `batch` in order.

    Tensors and lists with one element per sample are tiled along dimension 0; other values are unchanged.

    Raises:
        ValueError: If tensors have different numbers of samples, or there are no samples.
    """
    sizes = set(_first_dims(batch))
    if len(sizes) != 1 or 0 in sizes:
        found = f"tensors with first dimensions {sorted(sizes)}" if sizes else "no tensor"
        raise ValueError(
            "`batch`: a memory probe makes batches of other sizes from the first one, along dimension 0, so its "
            f"tensors must agree on its size. Got {found}. Put the samples on dimension 0, or give the microbatch "
            "size yourself."
        )
    count = sizes.pop()
    return _samples_of(batch, count, torch.arange(size) % count)


def _samples_of(value: Any, size: int, rows: slice | Tensor) -> Any:
    """Returns the samples `rows` of a batch of `size` samples: a view for a slice, a copy for indices."""
    if isinstance(value, Tensor):
        return _rows_of(value, rows)
    if isinstance(value, list | tuple) and len(value) == size and not _holds_tensors(value):
        return type(value)(value[rows] if isinstance(rows, slice) else (value[i] for i in rows.tolist()))
    if isinstance(value, Mapping):
        items = {k: _samples_of(v, size, rows) for k, v in value.items()}
        kind: Any = type(value)  # a dict, or for example the BatchEncoding of transformers
        return kind(items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_samples_of(v, size, rows) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_samples_of(v, size, rows) for v in value)
    return apply_to_collection(value, Tensor, lambda t: _rows_of(t, rows))  # dataclasses


def _rows_of(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    if not tensor.ndim:
        return tensor
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows.to(tensor.device))


def _holds_tensors(values: list | tuple) -> bool:
    return any(isinstance(v, Tensor | list | tuple | Mapping) for v in values)


def signature(batch: Any) -> Hashable:
    """Returns a key that is equal for batches of the same structure, tensor shapes and dtypes, and other types."""
    parts: list[Hashable] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            parts.append((tuple(value.shape), value.dtype))
        elif isinstance(value, Mapping):
            for key in value:
                parts.append(key)
                walk(value[key])
        elif isinstance(value, list | tuple):
            parts.append(len(value))
            for item in value:
                walk(item)
        else:
            parts.append(type(value).__name__)
            apply_to_collection(value, Tensor, walk)

    walk(batch)
    return tuple(parts)
