"""Finds what a unit tells the rest of the step beside its result: attributes and containers that it changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_hybrid._torch_private import tree_flatten
from lightning_hybrid.ghosts.attributes import attributes_of_module
from lightning_hybrid.ghosts.ghost import Ghost

_CONTAINERS = (dict, list, set, deque)
_SCALARS = (str, bytes, int, float, complex)


def modules_outside(root: nn.Module, units: Iterable[str]) -> list[nn.Module]:
    """Returns the modules of `root` that are in none of `units`."""
    inside = {id(m) for name in units for m in root.get_submodule(name).modules()}
    return [m for m in root.modules() if id(m) not in inside]


class SideEffects:
    """The attributes of modules, and the arguments of a call, as they are before the call.

    Args:
        modules: The modules.
        arguments: The arguments of the call.
    """

    def __init__(self, modules: Iterable[nn.Module], arguments: Any) -> None:
        self._before = [(m, {k: (v, _content(v)) for k, v in attributes_of_module(m)}) for m in modules]
        self._arguments = arguments
        self._leaves = tree_flatten(arguments)[0]
        self._ignored: type = Ghost

    def any(self, *, tensors: bool) -> bool:
        """Returns True if a value has changed since that is no ghost, and with `tensors` False no tensor."""
        self._ignored = Ghost if tensors else torch.Tensor
        return any(self._changed())

    def _changed(self) -> Iterator[bool]:
        for module, before in self._before:
            for key, value in attributes_of_module(module):
                old, content = before.get(key, (None, None))
                if value is not old and self._holds_tensors_only(value):
                    continue  # see `LeftAttribute`
                new = key not in before and not isinstance(value, self._ignored)
                yield new or not self._same(old, value) or not self._same_content(content, _content(value))
        yield not self._same_content(self._leaves, tree_flatten(self._arguments)[0])

    def _holds_tensors_only(self, value: Any) -> bool:
        leaves = tree_flatten(value)[0]
        return bool(leaves) and all(isinstance(leaf, self._ignored) for leaf in leaves)

    def _same_content(self, old: list[Any] | None, new: list[Any] | None) -> bool:
        return old is None or new is None or (len(old) == len(new) and all(map(self._same, old, new)))

    def _same(self, old: Any, new: Any) -> bool:
        if old is new or isinstance(new, self._ignored):
            return True
        return type(old) is type(new) and isinstance(new, _SCALARS) and old == new


def _content(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, _CONTAINERS) else None
