"""A user's loader with its data dealt to the replicas: the same object to look at, with another iteration."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from lightning_hybrid.dataloader.sharding import BatchWeights


class Flow(Protocol):
    """How a loader's batches come to this rank."""

    history: deque[BatchWeights | None]
    """Of the batches that were handed out last."""

    def iterate(self, loader: Any, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Begins a pass; `start` begins the user's own."""
        ...

    def length(self, loader: Any, own: Callable[[], int]) -> int:
        """Steps of a pass; `own` is the length of the user's loader."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the pass is, for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next pass goes on there."""
        ...


class _Placed(DataLoader):
    flow: Flow
    users_loader: DataLoader

    def __iter__(self) -> Any:
        return self.flow.iterate(self, super().__iter__)

    def __len__(self) -> int:
        return self.flow.length(self, super().__len__)


class _Resumable(_Placed):
    def state_dict(self) -> dict[str, Any]:
        return self.flow.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.flow.load_state_dict(state)


def placed(loader: DataLoader, flow: Flow, *, resumable: bool, **parts: Any) -> DataLoader:
    """A copy of `loader`, of the user's own class, that iterates by `flow`.

    Args:
        loader: The user's loader, which stays as it is.
        flow: What iterates.
        resumable: Whether its place goes into checkpoints.
        **parts: Attributes of the copy, such as another `batch_sampler`.
    """
    copied: Any = copy.copy(loader)
    base = _Resumable if resumable else _Placed
    kind: Any = type(loader)
    copied.__class__ = types.new_class(kind.__name__, (base,) if kind is DataLoader else (base, kind))
    # a DataLoader refuses to have its parts set, since its sampler would not know; here both are set together
    copied.__dict__.update(parts, flow=flow, users_loader=loader, _iterator=None)
    if "in_order" in copied.__dict__:
        copied.__dict__["in_order"] = True
    return copied


def users_loader(loader: Any) -> Any:
    """The user's own loader, for one that is dealt: Lightning hands those out, and they may be given to it again."""
    if isinstance(loader, _Placed):
        return loader.users_loader
    return loader.loader if isinstance(loader, BatchStream) else loader


class BatchStream:
    """Any other iterable of batches, iterated by a flow."""

    def __init__(self, loader: Any, flow: Flow) -> None:
        self.loader, self.flow = loader, flow

    def __iter__(self) -> Iterator[Any]:
        return self.flow.iterate(self.loader, lambda: iter(self.loader))

    def __len__(self) -> int:
        return self.flow.length(self.loader, lambda: len(self.loader))

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while an instance is being copied
            raise AttributeError(name)
        return getattr(self.loader, name)


class ResumableStream(BatchStream):
    """With its place in checkpoints: the loader's own, if it keeps one."""

    def state_dict(self) -> dict[str, Any]:
        """Where the pass is."""
        return self._keeper.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next pass goes on there."""
        self._keeper.load_state_dict(state)

    @property
    def _keeper(self) -> Any:
        return self.loader if keeps_its_place(self.loader) else self.flow


def keeps_its_place(loader: Any) -> bool:
    """Whether a loader has a state of its own, as torchdata's StatefulDataLoader."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def generators_of(loader: Any) -> list[torch.Generator]:
    """The random generators that a loader and its samplers own."""
    batches = getattr(loader, "batch_sampler", None)
    owners = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = [g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)]
    return list({id(g): g for g in found}.values())
