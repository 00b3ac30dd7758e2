"""Copies of a user's loader that iterate over this replica's shard of its data."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from lightning_hybrid._torch_private import replace_parts
from lightning_hybrid.dataloader.sharding import BatchWeights


class Shard(Protocol):
    """This replica's shard of a loader's data: the batches that this rank iterates over."""

    history: deque[BatchWeights | None]
    """Weights of the last batches."""
    sizes: deque[int | None]
    """Numbers of samples that were read for the last batches; None: not known."""

    def iterate(self, loader: Any, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Returns an iterator over the shard; `start` returns one over the user's loader."""
        ...

    def length(self, loader: Any, own: Callable[[], int]) -> int:
        """Returns the number of steps of a pass; `own` returns the length of the user's loader."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the pass, for checkpoints."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next pass start at the saved position."""
        ...


Announce = Callable[[str], object]
"""Called before a collective with what this replica does: the others may not do it."""

_BEGINS = "begins to read a loader"


class _ShardedLoader(DataLoader):
    replica_shard: Shard
    users_loader: DataLoader
    announce: Announce

    def __iter__(self) -> Any:
        self.announce(_BEGINS)
        return self.replica_shard.iterate(self, super().__iter__)

    def __len__(self) -> int:
        return self.replica_shard.length(self, super().__len__)


class _ResumableLoader(_ShardedLoader):
    def state_dict(self) -> dict[str, Any]:
        return self.replica_shard.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.replica_shard.load_state_dict(state)


def sharded_loader(
    loader: DataLoader, shard: Shard, announce: Announce, *, resumable: bool, **parts: Any
) -> DataLoader:
    """Returns a copy of `loader`, of a subclass of the user's class, that iterates over `shard`.

    Args:
        loader: The user's loader, which is not changed.
        shard: This replica's shard.
        announce: Called when a pass begins.
        resumable: Whether checkpoints hold the position.
        **parts: Attributes of the copy, such as another `batch_sampler`.
    """
    copied: Any = copy.copy(loader)
    base = _ResumableLoader if resumable else _ShardedLoader
    kind: Any = type(loader)
    copied.__class__ = types.new_class(kind.__name__, (base,) if kind is DataLoader else (base, kind))
    replace_parts(copied, **parts, replica_shard=shard, users_loader=loader, announce=announce)
    if "in_order" in copied.__dict__:
        copied.__dict__["in_order"] = True
    return copied


def users_loader(loader: Any) -> Any:
    """Returns the user's loader behind a sharded one, which Lightning returns and users may pass to it again."""
    if isinstance(loader, _ShardedLoader):
        return loader.users_loader
    return loader.loader if isinstance(loader, BatchStream) else loader


class BatchStream:
    """Iterates over this replica's shard of any other iterable of batches."""

    def __init__(self, loader: Any, shard: Shard, announce: Announce) -> None:
        self.loader, self.replica_shard, self.announce = loader, shard, announce

    def __iter__(self) -> Iterator[Any]:
        self.announce(_BEGINS)
        return self.replica_shard.iterate(self.loader, lambda: iter(self.loader))

    def __len__(self) -> int:
        return self.replica_shard.length(self.loader, lambda: len(self.loader))

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while an instance is being copied
            raise AttributeError(name)
        return getattr(self.loader, name)


class ResumableStream(BatchStream):
    """A `BatchStream` whose position checkpoints hold; the loader's own position if it is stateful."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the pass."""
        return self._stateful.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next pass start at the saved position."""
        self._stateful.load_state_dict(state)

    @property
    def _stateful(self) -> Any:
        return self.loader if keeps_its_place(self.loader) else self.replica_shard


def keeps_its_place(loader: Any) -> bool:
    """Returns True if a loader is stateful, as torchdata's StatefulDataLoader."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def generators_of(loader: Any) -> list[torch.Generator]:
    """Returns the random generators that a loader and its samplers own."""
    batches = getattr(loader, "batch_sampler", None)
    owners = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = [g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)]
    return list({id(g): g for g in found}.values())
