"""Reads first batches for planning, without advancing loaders, datasets or random generators."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, default_convert

from lightning_hybrid._lightning_private import reads_in_turn, twins
from lightning_hybrid.dataloader.wrap import generators_of, users_loader
from lightning_hybrid.rng.state import preserved_generators, preserved_rng
from lightning_hybrid.spec.errors import PartitionError

_NONE: Any = object()
"""Marks the absence of a batch."""


class Share(NamedTuple):
    """A replica's share of the samples or batches that a single process reads."""

    replica: int
    replicas: int


def sample_batch(loaders: Any, *, training: bool, share: Share | None = None) -> tuple[Any, tuple[int, ...]]:
    """Returns the first batch of a step and the index of its loader, without advancing anything.

    Args:
        loaders: The user's loaders: a loader, a collection, or Lightning's `CombinedLoader`.
        training: True for training steps, whose batch holds one batch of every loader and which have no loader index.
        share: The replica for which a batch like its first one is returned; None: the first batch of one process.

    Returns:
        The batch, and a tuple with the loader index if the step has such an argument.

    Raises:
        PartitionError: If there is no batch, or a loader can be iterated only once.
    """
    combined = loaders
    if not isinstance(loaders, twins(CombinedLoader)):
        combined = CombinedLoader(loaders, "max_size_cycle" if training else "sequential")
    if not reads_in_turn(combined):
        return first_batch(combined.iterables, share), ()
    for number, loader in enumerate(combined.flattened):
        batch = _first(loader, share)
        if batch is not _NONE:
            return batch, (number,) if not training and len(combined.flattened) > 1 else ()
    raise _no_batch()


def size_of_batches(loaders: Any) -> int | None:
    """Returns the number of samples that all `loaders` read for a first batch; None if it differs or is not known."""
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
    sizes = set()
    for loader in map(users_loader, combined.flattened):
        size = loader.batch_size if isinstance(loader, DataLoader) else None
        if size is not None and not isinstance(loader.dataset, IterableDataset):
            size = min(size, len(loader.dataset))  # type: ignore[arg-type]
        sizes.add(size)
    return sizes.pop() if len(sizes) == 1 else None


def first_batch(loaders: Any, share: Share | None = None) -> Any:
    """Returns the first batch of a loader, or of all loaders of a collection, without advancing anything.

    Raises:
        PartitionError: If a loader has no batch, or can be iterated only once.
    """
    if isinstance(loaders, Mapping):
        return {k: first_batch(v, share) for k, v in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)(first_batch(v, share) for v in loaders)
    batch = _first(loaders, share)
    if batch is _NONE:
        raise _no_batch()
    return batch


def _no_batch() -> PartitionError:
    return PartitionError(
        "`layout` with `tp` or `pp` is planned with the first batch, but the data has none: its dataset is empty, or "
        "smaller than a batch with `drop_last=True`. Give it at least one batch."
    )


def _first(loader: Any, share: Share | None = None) -> Any:
    replica, replicas = share or Share(0, 1)
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
            return _first_of_data_loader(loader, replica, replicas)
        iterator = iter(loader)
        if iterator is loader:
            raise PartitionError(
                f"`layout` with `tp` or `pp` reads the first batch before training, but the data loader of type "
                f"{type(loader).__name__} can be iterated only once. Wrap it in an object whose `__iter__` starts "
                "from the beginning."
            )
        return _nth(iterator, replica)


@contextmanager
def preserved_position(source: Any) -> Iterator[None]:
    """Restores the position of a stateful loader or dataset (`state_dict`) at exit."""
    stateful = callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None))
    place = copy.deepcopy(source.state_dict()) if stateful else None
    try:
        yield
    finally:
        if stateful:
            source.load_state_dict(place)


def _first_of_data_loader(loader: DataLoader, replica: int, replicas: int) -> Any:
    """Returns the first batch of a replica: of every `replicas`-th sample, or batch of a user's batch sampler."""
    with preserved_generators(generators_of(loader)):
        if isinstance(loader.dataset, IterableDataset):
            stream = iter(loader.dataset)
            if loader.batch_size is None:
                samples: Any = _nth(stream, replica)
            else:
                read = list(itertools.islice(stream, loader.batch_size * replicas))
                samples = read[replica::replicas] or read or _NONE
        else:
            batched = loader.batch_sampler is not None
            sampler: Any = loader.batch_sampler if batched else loader.sampler
            if batched and type(sampler) is BatchSampler:
                read = [key for keys in itertools.islice(sampler, replicas) for key in keys]
                keys: Any = read[replica::replicas] or read or _NONE
            else:
                keys = _nth(iter(sampler), replica)
            if keys is not _NONE:
                return _collated(loader, keys, batched)
            samples = _NONE
    return _NONE if samples is _NONE else (loader.collate_fn or default_convert)(samples)


def _nth(iterator: Iterator[Any], number: int) -> Any:
    """Returns the item `number` of an iterator, or its last one, or `_NONE` if there is none."""
    items = list(itertools.islice(iterator, number + 1))
    return items[-1] if items else _NONE


def batch_of(loader: Any, keys: Sequence[Any]) -> Any:
    """Returns the batch of the samples `keys` of a map-style DataLoader, without advancing anything."""
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
