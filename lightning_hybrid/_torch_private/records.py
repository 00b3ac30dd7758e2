"""Trees whose dataclasses and simple namespaces are containers, too, unlike those of torch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from torch.utils import _pytree


class _Record:
    """Takes the place of an object while a tree is flattened."""

    def __init__(self, kind: type, names: tuple[str, ...], values: list[Any]) -> None:
        self.kind, self.names, self.values = kind, names, values


def is_object_of_fields(value: Any) -> bool:
    """Returns True for a dataclass or a simple namespace, unless torch knows it as a container."""
    if isinstance(value, type) or type(value) in _pytree.SUPPORTED_NODES or isinstance(value, dict | list | tuple):
        return False
    return isinstance(value, SimpleNamespace) or (dataclasses.is_dataclass(value) and hasattr(value, "__dict__"))


def with_fields(kind: type, fields: dict[str, Any]) -> Any:
    """Returns an object of the class `kind` with these attributes, without calling its `__init__`."""
    made = object.__new__(kind)
    made.__dict__.update(fields)
    return made


def flatten_fields(tree: Any) -> tuple[list[Any], _pytree.TreeSpec]:
    """Flattens as `tree_flatten` does, and into the attributes of dataclasses; `tree_unflatten` makes new ones."""
    return _pytree.tree_flatten(_with_records(tree))


def _with_records(tree: Any) -> Any:
    if is_object_of_fields(tree):
        return _Record(type(tree), tuple(vars(tree)), [_with_records(v) for v in vars(tree).values()])
    if type(tree) in (list, tuple):
        items = [_with_records(v) for v in tree]
        return tree if all(a is b for a, b in zip(items, tree, strict=True)) else type(tree)(items)
    if type(tree) is dict:
        mapped = {k: _with_records(v) for k, v in tree.items()}
        return tree if all(mapped[k] is v for k, v in tree.items()) else mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        named: Any = tree
        items = [_with_records(v) for v in named]
        same = all(a is b for a, b in zip(items, named, strict=True))
        return named if same else named._replace(**dict(zip(named._fields, items, strict=True)))
    return tree


def _flatten(record: _Record) -> tuple[list[Any], tuple[type, tuple[str, ...]]]:
    return record.values, (record.kind, record.names)


def _unflatten(values: Any, context: Any) -> Any:
    kind, names = context
    return with_fields(kind, dict(zip(names, values, strict=True)))


_pytree.register_pytree_node(_Record, _flatten, _unflatten)
