"""Tensors that a unit leaves in attributes of its modules (`self.aux_loss = ...`), which later code may read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_hybrid._torch_private import TreeSpec, tree_flatten, tree_map, tree_unflatten
from lightning_hybrid.ghosts.ghost import Ghost

_OF_TORCH = ("_parameters", "_buffers", "_modules")


def attributes_of_module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of `module` by name, without parameters, buffers, modules and hooks."""
    return ((k, v) for k, v in vars(module).items() if k not in _OF_TORCH and not k.endswith("_hooks"))


class Attributes:
    """The attributes of modules before a call.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before = [(module, dict(attributes_of_module(module))) for module in modules]

    def changed(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """Yields the attributes that are other objects than before, each with its module, name and value."""
        for module, before in self._before:
            now = list(attributes_of_module(module))
            yield from ((module, k, v) for k, v in now if v is not before.get(k, ...))

    def replace_tensors(self, function: Callable[[Any], Any]) -> None:
        """Replaces every leaf x of the changed attributes that have tensors by `function(x)`."""
        for module, key, value in list(self.changed()):
            if any(isinstance(leaf, torch.Tensor) for leaf in tree_flatten(value)[0]):
                vars(module)[key] = tree_map(function, value)


@dataclass(frozen=True, kw_only=True)
class LeftAttribute:
    """An attribute with tensors that a unit computes."""

    module: nn.Module
    key: str
    spec: TreeSpec
    leaves: tuple[tuple[str, Any], ...]
    """How to rebuild the value without running the unit: `("same", i)` for tensor i that the unit has returned or left
    before this one, and otherwise as for the unit's result."""

    def present(self) -> list[Any]:
        """Returns the leaves of the present value."""
        return tree_flatten(vars(self.module).get(self.key))[0]

    def replace(self, function: Callable[[Any], Any]) -> None:
        """Replaces every leaf x of the present value by `function(x)`."""
        vars(self.module)[self.key] = tree_map(function, vars(self.module)[self.key])

    def rebuild(self, known: list[Any], inputs: Sequence[Any], ghost: Callable[[torch.Tensor], Ghost]) -> None:
        """Sets the attribute as the unit would do.

        Args:
            known: The leaves of what the unit has returned or left so far; those of the attribute are added.
            inputs: The leaves of the unit's arguments.
            ghost: Returns a ghost like a meta tensor.
        """
        made: list[Any] = []
        for kind, value in self.leaves:
            found = {"same": lambda v: known[v], "in": lambda v: inputs[v], "ghost": ghost, "value": lambda v: v}
            made.append(found[kind](value))
        known += made
        vars(self.module)[self.key] = tree_unflatten(made, self.spec)


def left_attribute(
    module: nn.Module, key: str, value: Any, known: Sequence[Any], inputs: Sequence[Any]
) -> LeftAttribute | None:
    """Returns how to rebuild an attribute of a unit that has run; None if it has no tensors of the unit."""
    leaves, spec = tree_flatten(value)
    if not any(isinstance(leaf, Ghost) for leaf in leaves):
        return None
    positions = {id(x): ("in", i) for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)}
    positions |= {id(x): ("same", i) for i, x in enumerate(known) if isinstance(x, torch.Tensor)}
    kinds = [
        positions.get(id(leaf)) or (("ghost", leaf.meta) if isinstance(leaf, Ghost) else ("value", leaf))
        for leaf in leaves
    ]
    return LeftAttribute(module=module, key=key, spec=spec, leaves=tuple(kinds))
