"""Reads a first batch to plan with, without advancing loaders, datasets or random generators."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, default_convert

from lightning_hybrid._lightning_private import reads_in_turn
from lightning_hybrid.dataloader.wrap import generators_of, users_loader
from lightning_hybrid.rng.state import preserved_generators, preserved_rng
from lightning_hybrid.spec.errors import PartitionError

_NONE: Any = object()
"""In the place of a batch where there is none."""


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
    with preserved_rng(), ExitStack() as stack:
        for owner in {id(o): o for o in owners}.values():
            stack.enter_context(preserved_position(owner))
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
def preserved_position(source: Any) -> Iterator[None]:
    """A loader or dataset that keeps its own place (`state_dict`) is afterwards where it was before."""
    stateful = callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None))
    place = copy.deepcopy(source.state_dict()) if stateful else None
    try:
        yield
    finally:
        if stateful:
            source.load_state_dict(place)


def _first_of_data_loader(loader: DataLoader) -> Any:
    with preserved_generators(generators_of(loader)):
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
    with preserved_rng(), preserved_position(loader.dataset):
        return _collated(loader, keys, batched=True)


def _collated(loader: DataLoader, keys: Any, batched: bool) -> Any:
    fetch = getattr(loader.dataset, "__getitems__", None)
    if not batched:
        samples = loader.dataset[keys]
    else:
        samples = fetch(keys) if fetch is not None else [loader.dataset[i] for i in keys]
    return (loader.collate_fn or default_convert)(samples)
