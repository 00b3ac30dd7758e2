"""Looks into batches: the values of containers and objects, and a key for batches of equal form."""

from __future__ import annotations

import datetime
import decimal
import fractions
import pathlib
import types
import uuid
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SCALARS = (
    str, bytes, int, float, complex, type(None), Enum, np.generic, torch.dtype, torch.device, torch.layout, slice,
    range, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction, uuid.UUID,
    pathlib.PurePath, type, types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip
"""Types of values that have no parts and do not change."""
LEAVES = (*SCALARS, Tensor, np.ndarray)
_DECIDING = (str, bytes, int, type(None), Enum)
"""Types of scalars by which the user's code may choose what to compute."""
_OPAQUE = (nn.Module, types.ModuleType, weakref.ReferenceType, torch.Generator, types.GeneratorType, deque)
_BUILT_IN = (object, dict, list, tuple, OrderedDict, defaultdict, types.SimpleNamespace)
_PYTHON_CLASS = 1 << 9
"""Flag of classes that a `class` statement has made (`Py_TPFLAGS_HEAPTYPE`)."""


def is_record(value: Any) -> bool:
    """Returns True for a named tuple."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def is_opaque(value: Any) -> bool:
    """Returns True for an object whose values are not all in its attributes and items."""
    if isinstance(value, LEAVES):
        return False
    if isinstance(value, set | frozenset):
        return not all(isinstance(item, SCALARS) for item in value)
    kinds = [kind for kind in type(value).__mro__ if kind not in _BUILT_IN]
    return isinstance(value, _OPAQUE) or not all(kind.__flags__ & _PYTHON_CLASS for kind in kinds)


def attributes_of(value: Any) -> list[tuple[str, Any]]:
    """Returns the attributes of an object by name; none for modules and the like."""
    if isinstance(value, _OPAQUE):
        return []
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if not name.startswith("__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return list(found.items())


def children_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the values of a container or object, each with the Python text that leads to it from there."""
    if is_record(value):
        yield from ((f".{name}", item) for name, item in zip(value._fields, value, strict=True))
        return
    if isinstance(value, LEAVES):
        return
    if isinstance(value, Mapping) and not isinstance(value, UserDict):
        yield from ((f"[{key!r}]", value[key]) for key in value)
    elif isinstance(value, list | tuple | deque | set | frozenset):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    for name, item in attributes_of(value):
        if isinstance(value, UserDict) and name == "data":
            yield from ((f"[{key!r}]", part) for key, part in item.items())
        else:
            yield f".{name}", item


def leaves_of(batch: Any) -> Iterator[tuple[str, Any]]:
    """Yields all values without parts in containers and objects, each once, with the Python text that leads to it."""
    seen: set[int] = set()

    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, LEAVES):
            yield path, value
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        children = list(children_of(value))
        if not children:
            yield path, value
        for name, child in children:
            yield from walk(path + name, child)

    yield from walk("batch", batch)


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yields the tensors of a batch, also those in attributes of objects."""
    return (leaf for _, leaf in leaves_of(batch) if isinstance(leaf, Tensor))


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Returns the dense tensors that a sparse or nested tensor consists of; any other tensor unchanged."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        return [whole.indices(), whole.values()]
    return [tensor] if tensor.layout == torch.strided else [tensor.to_dense()]


def signature(batch: Any, *, values: bool = False) -> Hashable:
    """Returns a key that is equal for batches of the same structure, tensor shapes and dtypes, and other types.

    Args:
        batch: The batch.
        values: Whether the key has the values of numbers, texts and constants, too, except for those in lists of them.
    """
    parts: list[Hashable] = []
    seen: set[int] = set()

    def walk(value: Any, fixed: bool) -> None:
        if isinstance(value, Tensor):
            parts.append(_form_of(value))
        elif isinstance(value, np.ndarray):
            parts.append((value.shape, value.dtype.str))
        elif isinstance(value, SCALARS):
            parts.append(type(value).__name__)
            if values and fixed and isinstance(value, _DECIDING):
                parts.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            parts.append(type(value).__name__)
            children = list(children_of(value))
            plain = isinstance(value, list | tuple) and all(isinstance(item, SCALARS) for item in value)
            parts.append(len(children))
            for name, child in children:
                parts.append(name)
                walk(child, not plain)

    walk(batch, True)
    return tuple(parts)


def _form_of(tensor: Tensor) -> Hashable:
    if tensor.layout == torch.strided and not tensor.is_nested:
        return tuple(tensor.shape), tensor.dtype
    return str(tensor.layout), tensor.dtype, tuple(tuple(part.shape) for part in dense_parts(tensor))
