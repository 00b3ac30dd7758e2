"""Counts the samples of batches, and splits batches into microbatches.

A batch is split only if each of its values is known to be split or not: tensors with the samples on dim 0 and lists
with one element per sample are split, Python scalars and 0-dim tensors are the same for all samples. A batch with any
other value (a graph, a sparse tensor, a list that may or may not be one of samples) is not split.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_hybrid._torch_private import tree_leaves
from lightning_hybrid.batches.values import (
    LEAVES,
    SCALARS,
    attributes_of,
    children_of,
    is_opaque,
    is_record,
    tensors_in,
)

_FEW = 3
"""Up to this length, a batch that is a list of tensors is more likely one of inputs and targets than of samples."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a batch."""

    count: int | None
    """The number of samples; None if the batch cannot be split."""
    obstacle: str = ""
    """The value because of which the batch cannot be split, and why."""
    has_columns: bool = False
    """True for tensors with as many rows as there are tensors: more likely inputs and targets than samples."""


def find_samples(batch: Any, known: int | None = None) -> Samples:
    """Returns the number of samples of a batch if each of its values can be split by samples, or is the same for all.

    Args:
        batch: The batch, of any structure.
        known: The number of samples that the loader has read for the batch; None: the tensors' size on dim 0.
    """
    count = known
    if count is None:
        sizes = dict(_first_dims_outside_lists(batch, "batch"))
        if not sizes:
            return Samples(count=None, obstacle="`batch` has no tensor with samples on dim 0 outside of lists")
        path, count = next(iter(sizes.items()))
        other = next((f"`{p}` has {n} rows and `{path}` has {count}" for p, n in sizes.items() if n != count), None)
        if other is not None:
            return Samples(count=None, obstacle=other)
        if isinstance(batch, list | tuple) and len(batch) > 2 and len(batch) != count and _alike(batch):
            return Samples(count=None, obstacle=f"`batch` is a {type(batch).__name__} of {len(batch)} similar tensors")
    obstacle = _obstacle(batch, count, "batch", (), known is not None)
    if not obstacle:
        return Samples(count=count)
    columns = isinstance(batch, list | tuple) and all(isinstance(v, Tensor) and v.shape[:1] == (count,) for v in batch)
    return Samples(count=None, obstacle=obstacle, has_columns=columns and len(batch) <= _FEW)


def count_samples(batch: Any) -> int:
    """Returns the number of samples of the first tensor that has dimensions; 1 if there is none."""
    return next((_rows(t) for t in tensors_in(batch) if t.ndim), 1)


def agreed_samples(batch: Any) -> int | None:
    """Returns the size of dim 0 if it is the same for all tensors with dimensions; otherwise None."""
    sizes = {_rows(t) for t in tensors_in(batch) if t.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def count_tokens(batch: Any) -> int | None:
    """Returns the number of elements of a batch's first tensor, such as `input_ids`; None if there is none."""
    return next((leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)


def split_batch(batch: Any, parts: int, known: int | None = None) -> list[Any]:
    """Splits a batch of any nested structure into `parts` equal parts along dimension 0.

    Tensors and lists with one element per sample are split; every part contains all other values whole.

    Args:
        batch: A batch for which `find_samples` has a number of samples, unless `parts` is 1.
        parts: The number of parts, a divisor of the number of samples.
        known: As for `find_samples`.
    """
    if parts == 1:
        return [batch]
    count = find_samples(batch, known).count or 0
    size = count // parts
    return [_samples_of(batch, count, slice(i * size, (i + 1) * size), True) for i in range(parts)]


def joined_batches(batches: Sequence[Any], known: int | None = None) -> Any:
    """Returns one batch of the samples of several batches of equal structure.

    Args:
        batches: Batches for which `find_samples` has numbers of samples.
        known: As for `find_samples`, of the first batch.

    Raises:
        ValueError: If they cannot be joined: values that belong to no sample differ, or the shapes of samples.
    """
    return _joined(batches, find_samples(batches[0], known).count or 0, True)


def samples_of_batch(batch: Any, count: int, samples: slice) -> Any:
    """Returns some consecutive samples of a batch of `count` samples, as `find_samples` counts them."""
    return _samples_of(batch, count, samples, True)


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
    found = positions_of(batch)
    if found is None or found % length:
        what = "no tensor has positions along dim 1" if found is None else f"samples have {found} positions"
        raise ValueError(f"`sequence_length={length}` must divide the length of samples, but {what}.")

    def split(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or tensor.shape[1] != found:
            return tensor
        return tensor.unflatten(1, (-1, length)).flatten(0, 1)

    return apply_to_collection(batch, Tensor, split)


def positions_of(batch: Any) -> int | None:
    """Returns the size of dim 1 of the first tensor with two dims; None if there is none."""
    return next((t.shape[1] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim > 1), None)


def tiled_batch(batch: Any, size: int) -> Any:
    """Returns a batch of `size` samples that repeats those of `batch` in order.

    Tensors and lists with one element per sample are tiled along dimension 0; other values are unchanged.

    Raises:
        ValueError: If the batch cannot be split into samples, or has none.
    """
    found = find_samples(batch)
    if not found.count:
        raise ValueError(
            "`batch`: a memory probe makes batches of other sizes from the first one, along dimension 0. "
            f"{found.obstacle or 'There are no samples'}. Put the samples on dimension 0 of all tensors, or give the "
            "microbatch size yourself."
        )
    return _samples_of(batch, found.count, torch.arange(size) % found.count, True)


# ---- whether a batch can be split


def _rows(tensor: Tensor) -> int:
    return int(tensor.size(0))


def _first_dims_outside_lists(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yields the size of dim 0 of each tensor that is in no list, except the batch itself."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield path, _rows(value)
        return
    if is_opaque(value) or (isinstance(value, list | tuple) and path != "batch" and not is_record(value)):
        return
    for name, child in children_of(value):
        yield from _first_dims_outside_lists(child, path + name)


def _obstacle(value: Any, count: int, path: str, above: tuple[int, ...], known: bool) -> str | None:
    """Returns why a value can neither be split into `count` samples nor be the same for all; None if it can."""
    if isinstance(value, Tensor | np.ndarray):
        return _tensor_obstacle(value, count, path, known)
    if isinstance(value, SCALARS):
        may_be_count = type(value) is int and value == count > 1
        return f"`{path}` is {count}, which may be the number of samples" if may_be_count else None
    if id(value) in above or _is_closed(value):
        return f"`{path}` is a {type(value).__name__}, whose parts that belong to a sample are not known"
    if isinstance(value, list | tuple) and not is_record(value):
        by_samples = _is_list_of_samples(value, count, path == "batch")
        if by_samples is None:
            kind = type(value).__name__
            return f"`{path}` is a {kind} of {len(value)}, which may or may not have one element for each sample"
        if by_samples:
            return None
    parts = ((path + name, child) for name, child in children_of(value))
    found = (_obstacle(child, count, inner, (*above, id(value)), known) for inner, child in parts)
    return next((text for text in found if text is not None), None)


def _is_closed(value: Any) -> bool:
    own_mapping = isinstance(value, Mapping) and not isinstance(value, dict | UserDict)
    return own_mapping or isinstance(value, PackedSequence) or is_opaque(value)


def _tensor_obstacle(value: Any, count: int, path: str, known: bool) -> str | None:
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
        return f"`{path}` is a {'nested' if value.is_nested else 'sparse'} tensor"
    if isinstance(value, Tensor) and type(value) is not Tensor and not _keeps_class(value):
        return f"`{path}` is a {type(value).__name__}, which loses its class or attributes when it is split"
    if value.ndim and value.shape[0] != count:
        what = f"the loader has read {count} samples" if known else f"other tensors have {count}"
        return f"`{path}` has {value.shape[0]} rows, and {what}"
    return None


def _keeps_class(tensor: Tensor) -> bool:
    part = tensor[:1] if tensor.ndim else tensor
    return type(part) in (type(tensor), Tensor if isinstance(tensor, torch.nn.Parameter) else type(tensor)) and (
        not vars(tensor) or vars(part) == vars(tensor)
    )


def _is_list_of_samples(values: list | tuple, count: int, is_batch: bool) -> bool | None:
    """Returns True if `values` has one element per sample, False if it does not; None if that is not known.

    Args:
        values: The list.
        count: The number of samples.
        is_batch: True if the list is the batch itself.
    """
    if len(values) != count or not values:
        return False
    rows = [_rows(t) for t in tensors_in(values) if t.ndim]
    if not rows:
        return True
    if not _alike(values):
        return False
    split = [n == count for n in rows]
    if all(split) or (is_batch and any(split)):
        return None
    bare = any(isinstance(v, Tensor) for v in values)
    return None if is_batch and bare and count <= _FEW else True


def _alike(values: list | tuple) -> bool:
    """Returns True if the values have the same form, as samples have."""
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        return False
    if isinstance(first, Mapping):
        return all(set(v) == set(first) for v in values)
    if isinstance(first, Tensor):
        same = all(v.dtype == first.dtype and v.ndim == first.ndim for v in values)
        return same and (len({v.shape[1:] for v in values}) == 1 or len({v.shape[:1] for v in values}) == 1)
    if isinstance(first, tuple):
        return all(len(v) == len(first) for v in values)
    return True


# ---- the samples of a batch


def _samples_of(value: Any, count: int, rows: slice | Tensor, is_batch: bool = False) -> Any:
    """Returns the samples `rows` of a batch of `count` samples: a view for a slice, a copy for indices."""
    if isinstance(value, Tensor | np.ndarray):
        return _rows_of(value, rows)
    if isinstance(value, (*SCALARS, set, frozenset)):
        return value
    if is_record(value):
        return type(value)(*(_samples_of(v, count, rows) for v in value))
    part: Any = copy.copy(value)
    if isinstance(value, list | tuple):
        part = _picked(value, count, rows, is_batch)
    if isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(part, key, _samples_of(item, count, rows))
    for name, item in attributes_of(value):
        object.__setattr__(part, name, _samples_of(item, count, rows))
    return part


def _picked(values: Any, count: int, rows: slice | Tensor, is_batch: bool) -> Any:
    """Returns a list or tuple of the class of `values`, without its attributes."""
    if _is_list_of_samples(values, count, is_batch):
        items = values[rows] if isinstance(rows, slice) else [values[i] for i in rows.tolist()]
    else:
        items = [_samples_of(v, count, rows) for v in values]
    return _sequence_like(values, items)


def _sequence_like(values: Any, items: Sequence[Any]) -> Any:
    """Returns a list or tuple of the class of `values` with `items`, without attributes."""
    if isinstance(values, tuple):
        return tuple.__new__(type(values), items)
    part = list.__new__(type(values))
    list.extend(part, items)
    return part


def _joined(values: Sequence[Any], count: int, is_batch: bool = False) -> Any:
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        raise ValueError("values of other classes")
    if isinstance(first, (*LEAVES, set, frozenset)):
        return _joined_leaves(values)
    if is_record(first):
        return type(first)(*(_joined(each, count) for each in zip(*values, strict=True)))
    whole: Any = copy.copy(first)
    if isinstance(first, list | tuple):
        by_samples = _is_list_of_samples(first, count, is_batch)
        items = chain(*values) if by_samples else (_joined(each, count) for each in zip(*values, strict=True))
        whole = _sequence_like(first, list(items))
    if isinstance(first, dict):
        for key in first:
            dict.__setitem__(whole, key, _joined([v[key] for v in values], count))
    for name, _ in attributes_of(first):
        object.__setattr__(whole, name, _joined([getattr(v, name) for v in values], count))
    return whole


def _joined_leaves(values: Sequence[Any]) -> Any:
    first = values[0]
    if not isinstance(first, Tensor | np.ndarray) or not first.ndim:
        if any(bool(v != first) for v in values):
            raise ValueError("other values that belong to no sample")
        return first
    if any(v.shape[1:] != first.shape[1:] for v in values):
        raise ValueError("samples of other shapes")
    return torch.cat(list(values)) if isinstance(first, Tensor) else np.concatenate(values)


def _rows_of(value: Any, rows: slice | Tensor) -> Any:
    if not value.ndim:
        return value
    if isinstance(rows, slice):
        # autograd counts writes to each microbatch separately: a step may write into its batch
        return value[rows].data if type(value) is Tensor and not value.requires_grad else value[rows]
    return value.index_select(0, rows.to(value.device)) if isinstance(value, Tensor) else value[rows.numpy()]
