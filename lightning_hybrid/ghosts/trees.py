"""Tensors in nested arguments and results, and the parameter slots of a module in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_hybrid._torch_private import is_object_of_fields, tree_flatten, tree_unflatten, with_fields
from lightning_hybrid.ghosts.ghost import Slot, parameter_slots
from lightning_hybrid.spec.tensor_plan import Path


def sorted_slots(root: nn.Module) -> list[Slot]:
    """Returns the parameter slots of `root` sorted by name, independent of the order of construction."""
    return sorted(parameter_slots(root), key=lambda slot: slot.name)


def map_tensors(function: Callable[[Path, torch.Tensor], Any], tree: Any, path: Path = ()) -> Any:
    """Returns `tree` (nested tuples, lists, dicts) with every tensor replaced by `function(path, tensor)`."""
    if isinstance(tree, torch.Tensor):
        return function(path, tree)
    if isinstance(tree, dict):
        mapped = {k: map_tensors(function, v, (*path, k)) for k, v in tree.items()}
        return mapped if type(tree) is dict else _like_dict(tree, mapped)
    if isinstance(tree, (list, tuple)):
        items = [map_tensors(function, v, (*path, i)) for i, v in enumerate(tree)]
        return _like_tuple(tree, items) if hasattr(tree, "_fields") else type(tree)(items)
    if is_object_of_fields(tree):
        fields = {k: map_tensors(function, v, (*path, k)) for k, v in vars(tree).items()}
        return tree if all(fields[k] is v for k, v in vars(tree).items()) else with_fields(type(tree), fields)
    return tree


def _like_tuple(tree: Any, items: list) -> Any:
    try:
        return type(tree)(*items)
    except (TypeError, ValueError, AssertionError):  # it checks its fields, as a PackedSequence does
        return tuple(items)


def _like_dict(tree: dict, mapped: dict) -> Any:
    try:
        return type(tree)(**mapped)
    except TypeError:
        return mapped


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Returns the tensors of `tree`, in order."""
    tensors: list[torch.Tensor] = []
    map_tensors(lambda _, tensor: tensors.append(tensor), tree)
    return tensors


def replace_in_place(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns `tree` with every leaf x replaced by `function(x)`.

    Lists, dictionaries and dataclasses are changed in place, since the code that has made them may read them later.
    """
    if isinstance(tree, dict | list):
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            new = replace_in_place(function, value)
            if new is not value:
                tree[key] = new
        return tree
    if type(tree) is tuple or hasattr(tree, "_fields"):
        items = [replace_in_place(function, value) for value in tree]
        return tree if all(a is b for a, b in zip(items, tree, strict=True)) else _like_items(tree, items)
    if is_object_of_fields(tree):
        vars(tree).update({k: replace_in_place(function, v) for k, v in vars(tree).items()})
        return tree
    leaves, spec = tree_flatten(tree)
    new_leaves = [function(leaf) for leaf in leaves]
    return tree if all(a is b for a, b in zip(leaves, new_leaves, strict=True)) else tree_unflatten(new_leaves, spec)


def _like_items(tree: Any, items: list) -> Any:
    return tuple(items) if type(tree) is tuple else _like_tuple(tree, items)
