"""Restores objects and module state after a dry run of a user's step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_hybrid._torch_private import own_buffers, version_of
from lightning_hybrid.ghosts.objects import Copy
from lightning_hybrid.ghosts.state import ModuleState

_CONTAINERS = (dict, list, set, deque)


class SavedObjects:
    """The attributes of objects as they are now, with the content of the containers among them.

    Args:
        objects: Each has a `__dict__`.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._attributes = [(obj, dict(vars(obj))) for obj in objects]
        self._containers: list[tuple[Any, Any]] = [
            (v, dict(v) if isinstance(v, dict) else list(v))  # `copy.copy` of a subclass costs ten times as much
            for _, saved in self._attributes
            for v in saved.values()
            if isinstance(v, _CONTAINERS)
        ]

    def restore(self) -> None:
        """Makes attributes and containers as they were."""
        for obj, saved in self._attributes:
            vars(obj).clear()
            vars(obj).update(saved)
        for container, content in self._containers:
            container.clear()
            container.extend(content) if isinstance(container, list | deque) else container.update(content)


@contextmanager
def preserved_objects(objects: Iterable[Any]) -> Iterator[None]:
    """Restores the attributes of `objects`, and the content of containers among them, at exit."""
    saved = SavedObjects(objects)
    try:
        yield
    finally:
        saved.restore()


@contextmanager
def preserved_module_state(root: nn.Module) -> Iterator[None]:
    """Restores attributes, the objects they lead to, and tensors of every submodule of `root` at exit."""
    state = ModuleState(root)
    copies = state.copies()
    attributes = [t for m in root.modules() for t in (*own_buffers(m).values(), *m.__dict__.values())]
    tensors = _SavedTensors([*attributes, *(leaf for kept in copies.values() for leaf in kept.leaves())])
    try:
        with preserved_objects(root.modules()):
            yield
    finally:
        state.restore(copies)
        tensors.restore()


@contextmanager
def preserved_user_state(root: nn.Module, *others: Any) -> Iterator[None]:
    """Restores the state of the user's code in `root` and in `others` at exit; registered metrics stay as they are.

    Metrics in containers or other objects, such as a dictionary, are restored, too.
    """
    state = ModuleState(root)
    copies, own = state.copies(), [Copy(vars(other)) for other in others]
    leaves = [leaf for kept in (*copies.values(), *own) for leaf in kept.leaves()]
    registered = set(map(id, root.modules()))
    metrics = [m for leaf in leaves if isinstance(leaf, Metric | MetricCollection) for m in leaf.modules()]
    metrics = [m for m in metrics if id(m) not in registered]
    tensors = _SavedTensors([*leaves, *(t for m in metrics for v in vars(m).values() for t in _tensors_of(v))])
    try:
        with preserved_objects(metrics):
            yield
    finally:
        for kept in own:
            kept.restore()
        state.restore(copies)
        tensors.restore()


def _tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors_of(item)] if isinstance(value, list | tuple) else []


class _SavedTensors:
    """The values of tensors as they are now; other values are left out."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._saved: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        for tensor in values:
            # exact type: subclasses (ghosts, DTensors) have no plain storage, and parameters are not written by a step
            if type(tensor) is torch.Tensor and id(tensor) not in self._saved and not tensor.requires_grad:
                self._saved[id(tensor)] = (tensor, version_of(tensor), tensor.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the tensors their values back."""
        for tensor, version, saved in self._saved.values():
            # BatchNorm writes its running statistics without counting a version
            if version_of(tensor) != version or not torch.equal(tensor, saved):
                tensor.copy_(saved)
