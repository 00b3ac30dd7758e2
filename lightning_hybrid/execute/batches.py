"""Batches: how many samples one has, splitting it into microbatches, and a first batch to plan with."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, default_convert

from lightning_hybrid._lightning_private import reads_in_turn
from lightning_hybrid.analyze.preserve import random_streams_kept
from lightning_hybrid.execute.data.loader import users_loader
from lightning_hybrid.spec.errors import PartitionError

_NONE: Any = object()
"""In the place of a batch where there is none."""


def batch_size(batch: Any) -> int:
    """The number of samples: the size of dimension 0, on which all tensors with dimensions must agree.

    Raises:
        PartitionError: If they do not, or there is no tensor.
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
    """The number of samples by the first tensor that has dimensions; 1 where there is none."""
    sizes = _first_dims(batch)
    return sizes[0] if sizes else 1


def count_tokens(batch: Any) -> int | None:
    """The elements of a batch's first tensor, such as `input_ids`; None where there is no tensor."""
    return next((leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)


def _first_dims(batch: Any) -> list[int]:
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda t: sizes.append(t.shape[0]) if t.ndim else None)
    return sizes


def split_batch(batch: Any, count: int) -> list[Any]:
    """Splits a batch of any nested structure into `count` equal parts along dimension 0.

    Tensors and lists with one element a sample are split; everything else goes whole into every part.
    """
    if count == 1:
        return [batch]
    size = batch_size(batch)
    return [_samples_of(batch, size, slice(i * (size // count), (i + 1) * (size // count))) for i in range(count)]


def split_sequences(batch: Any, length: int) -> Any:
    """Samples of T positions along dim 1 as T / `length` samples of `length`; other tensors stay as they are.

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
    """A batch of `size` samples: those of `batch` in order, again and again.

    Tensors and lists with one element a sample are tiled along dimension 0; everything else stays as it is.

    Raises:
        ValueError: If the tensors do not agree on the number of samples, or there are none.
    """
    sizes = set(_first_dims(batch))
    if len(sizes) != 1 or 0 in sizes:
        found = f"tensors with first dimensions {sorted(sizes)}" if sizes else "no tensor"
        raise ValueError(
            "`batch`: a memory probe makes batches of other sizes from the first one, along dimension 0, so its "
            f"tensors must agree on its size. Got {found}. Put the samples on dimension 0, or give the micro-batch "
            "size yourself."
        )
    count = sizes.pop()
    return _samples_of(batch, count, torch.arange(size) % count)


def _samples_of(value: Any, size: int, rows: slice | Tensor) -> Any:
    """Some of the `size` samples of a batch: a view of a slice, a copy of those with the indices `rows`."""
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
    """Equal for batches that run the same way: shapes and types of tensors, and everything that is not a tensor."""
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


def sample_batch(loaders: Any, *, training: bool) -> tuple[Any, tuple[int, ...]]:
    """The first batch that a step is given, without advancing anything, and the index of its loader.

    Args:
        loaders: What the user has given: a loader, a collection, or Lightning's `CombinedLoader`.
        training: Whether for training, which takes a batch of every loader at once and no index.

    Returns:
        The batch, and in a tuple the index if the step is given one.

    Raises:
        PartitionError: If there is no batch, or a loader can be iterated only once.
    """
    combined = loaders
    if not isinstance(loaders, CombinedLoader):
        combined = CombinedLoader(loaders, "max_size_cycle" if training else "sequential")
    if not reads_in_turn(combined):
        return first_batch(combined.iterables), ()
    for number, loader in enumerate(combined.flattened):
        batch = _first(loader)
        if batch is not _NONE:
            return batch, (number,) if not training and len(combined.flattened) > 1 else ()
    raise _no_batch()


def first_batch(loaders: Any) -> Any:
    """The first batch of a loader, or of all loaders of a collection, without advancing anything.

    Raises:
        PartitionError: If a loader has no batch, or can be iterated only once.
    """
    if isinstance(loaders, Mapping):
        return {k: first_batch(v) for k, v in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)(first_batch(v) for v in loaders)
    batch = _first(loaders)
    if batch is _NONE:
        raise _no_batch()
    return batch


def _no_batch() -> PartitionError:
    return PartitionError(
        "`layout` with `tp` or `pp` is planned with the first batch, but the data has none: its dataset is empty, or "
        "smaller than a batch with `drop_last=True`. Give it at least one batch."
    )


def _first(loader: Any) -> Any:
    loader = users_loader(loader)
    batches = getattr(loader, "batch_sampler", None)
    owners = [
        loader,
        *(getattr(loader, k, None) for k in ("dataset", "sampler")),
        getattr(batches, "sampler", batches),
    ]
    with random_streams_kept(), ExitStack() as stack:
        for owner in {id(o): o for o in owners}.values():
            stack.enter_context(place_kept(owner))
        if isinstance(loader, DataLoader):
            return _first_of_data_loader(loader)
        iterator = iter(loader)
        if iterator is loader:
            raise PartitionError(
                f"`layout` with `tp` or `pp` looks at the first batch before training, but the data loader of type "
                f"{type(loader).__name__} can be iterated only once. Wrap it in an object whose `__iter__` starts "
                "anew."
            )
        return next(iterator, _NONE)


@contextmanager
def place_kept(source: Any) -> Iterator[None]:
    """A loader or dataset that keeps its own place (`state_dict`) is afterwards where it was before."""
    stateful = callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None))
    place = copy.deepcopy(source.state_dict()) if stateful else None
    try:
        yield
    finally:
        if stateful:
            source.load_state_dict(place)


def _first_of_data_loader(loader: DataLoader) -> Any:
    with _generators_kept(loader):
        if isinstance(loader.dataset, IterableDataset):
            stream = iter(loader.dataset)
            samples: Any = next(stream, _NONE)
            if loader.batch_size is not None and samples is not _NONE:
                samples = [samples, *itertools.islice(stream, loader.batch_size - 1)]
        else:
            batched = loader.batch_sampler is not None
            sampler: Any = loader.batch_sampler if batched else loader.sampler
            keys: Any = next(iter(sampler), _NONE)
            if keys is not _NONE:
                return _collated(loader, keys, batched)
            samples = _NONE
    return _NONE if samples is _NONE else (loader.collate_fn or default_convert)(samples)


def batch_of(loader: Any, keys: Sequence[Any]) -> Any:
    """The batch of these samples of a map-style DataLoader, without advancing anything."""
    loader = users_loader(loader)
    with random_streams_kept(), place_kept(loader.dataset):
        return _collated(loader, keys, batched=True)


def _collated(loader: DataLoader, keys: Any, batched: bool) -> Any:
    fetch = getattr(loader.dataset, "__getitems__", None)
    if not batched:
        samples = loader.dataset[keys]
    else:
        samples = fetch(keys) if fetch is not None else [loader.dataset[i] for i in keys]
    return (loader.collate_fn or default_convert)(samples)


@contextmanager
def _generators_kept(loader: DataLoader) -> Iterator[None]:
    owners = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    with ExitStack() as stack:
        for generator in {
            id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)
        }.values():
            stack.callback(generator.set_state, generator.get_state())
        yield
