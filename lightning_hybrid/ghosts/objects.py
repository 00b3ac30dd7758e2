"""What Python objects hold: copies to compare and restore them by, and the differences to send to other ranks.

State of the user's code may be in any object: numbers, tensors, lists and dictionaries in each other, arrays, random
generators, and objects of classes outside torch, Lightning and Python itself. Restoring an object keeps its identity
and that of everything in it, so other references to it see the restored content.
"""

from __future__ import annotations

import copy
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_hybrid._torch_private import version_of
from lightning_hybrid.ghosts.rewind import Rewindable, is_consumable
from lightning_hybrid.spec.code import module_of

_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_LISTS = (list, tuple, deque)
_NOT_SEARCHED = frozenset(
    {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_hybrid", "torchmetrics", "numpy"}
    | (sys.stdlib_module_names - {"types", "argparse", "collections"})
)
"""Packages whose objects count as a whole, without their attributes."""
_MANY, _DEPTH = 1000, 8
"""Number of items from which on those of a container count by identity only, and depth of the search. Empirical."""


class Copy:
    """The content of an object at one time, with references to everything in it.

    Args:
        value: The object.
        depth: Number of levels below `value` that are looked into.
    """

    __slots__ = ("inside", "state", "value")

    def __init__(self, value: Any, depth: int = _DEPTH, above: tuple[int, ...] = ()) -> None:
        self.value = value
        self.state: Any = None
        """The content of a plain value, tensor (number of writes), array, set, generator or long container."""
        self.inside: dict[Any, Copy] | None = None
        """Copies of the items or attributes, by key, index or name."""
        if isinstance(value, _PLAIN):
            self.state = repr(value) if isinstance(value, float | complex) else value  # NaN equals itself here
        elif isinstance(value, torch.Tensor):
            self.state = version_of(value)
        elif (kind := _kind_of(value)) is not None:
            self.state = kind.read(value)
        elif depth and id(value) not in above:
            items = _items_of(value)
            if items is None:
                return
            if any(map(is_consumable, items.values())):
                items = {k: Rewindable(v) if is_consumable(v) else v for k, v in items.items()}
                _refill(value, items)
            if len(items) > _MANY:
                self.state = list(items.items())
            else:
                above = (*above, id(value))
                self.inside = {k: Copy(v, depth - 1, above) for k, v in items.items()}

    def same_as(self, other: Copy) -> bool:
        """Returns True if both are copies of the same object with the same content."""
        mine, others = self.value, other.value
        if isinstance(mine, _PLAIN):
            return type(mine) is type(others) and self.state == other.state
        if mine is not others and not (type(mine) is type(others) is tuple):
            return False
        if self.inside is not None and other.inside is not None:
            return list(self.inside) == list(other.inside) and all(
                c.same_as(other.inside[k]) for k, c in self.inside.items()
            )
        if isinstance(self.state, list) and isinstance(other.state, list):
            return _identical(self.state, other.state)
        return (self.inside is None) == (other.inside is None) and _equal(self.state, other.state)

    def alike(self, other: Copy, tensors_alike: Callable[[torch.Tensor, torch.Tensor], bool]) -> bool:
        """Returns True if both hold equal content, in the same objects or in others of the same classes."""
        mine, others = self.value, other.value
        if type(mine) is not type(others):
            return False
        if isinstance(mine, torch.Tensor):
            return tensors_alike(mine, others)
        if self.inside is not None and other.inside is not None:
            return list(self.inside) == list(other.inside) and all(
                c.alike(other.inside[k], tensors_alike) for k, c in self.inside.items()
            )
        if self.inside is not None or other.inside is not None:
            return False
        return self.same_as(other) or (self.state is not None and _equal(self.state, other.state))

    def values(self) -> dict[Any, Any]:
        """Returns what is directly inside of the object."""
        if self.inside is not None:
            return {k: c.value for k, c in self.inside.items()}
        return dict(self.state) if isinstance(self.state, list) else {}

    def leaves(self) -> Iterator[Any]:
        """Yields the objects that nothing is inside of, such as tensors."""
        if self.inside is None:
            yield from (v for _, v in self.state) if isinstance(self.state, list) else (self.value,)
        else:
            for item in self.inside.values():
                yield from item.leaves()

    def release_items(self) -> None:
        """Forgets the positions of iterators, which keep all later items; the copy cannot restore them any more."""
        if isinstance(self.value, Rewindable):
            self.state = None
        for item in (self.inside or {}).values():
            item.release_items()

    def restore(self) -> Any:
        """Gives the object its content back, except for tensors, and returns it."""
        value = self.value
        kind = None if isinstance(value, (*_PLAIN, torch.Tensor)) else _kind_of(value)
        if kind is not None:
            kind.write(value, self.state)
        elif self.inside is not None:
            _refill(value, {k: c.restore() for k, c in self.inside.items()})
        elif isinstance(self.state, list):
            _refill(value, dict(self.state))
        return value


@dataclass(frozen=True)
class _Kind:
    """How to read and write the content of objects that count as a whole."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]


def _write_set(target: set, content: frozenset) -> None:
    if target != content:
        target.clear()
        target.update(content)


_KINDS: dict[type, _Kind] = {
    set: _Kind(frozenset, _write_set),
    np.ndarray: _Kind(lambda a: a.copy(), lambda a, kept: np.copyto(a, kept) if a.flags.writeable else None),
    torch.Generator: _Kind(lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    random.Random: _Kind(lambda r: r.getstate(), lambda r, state: r.setstate(state)),
    np.random.RandomState: _Kind(lambda r: r.get_state(legacy=False), lambda r, state: r.set_state(state)),
    Rewindable: _Kind(lambda i: i.position, lambda i, position: setattr(i, "position", position)),
    np.random.Generator: _Kind(lambda r: r.bit_generator.state, lambda r, s: setattr(r.bit_generator, "state", s)),
}


def _kind_of(value: Any) -> _Kind | None:
    return next((kind for base, kind in _KINDS.items() if isinstance(value, base)), None)


def _items_of(value: Any) -> dict[Any, Any] | None:
    """Returns what is directly inside of `value`, by key, index or name; None if nothing is looked into."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, _LISTS):
        return dict(enumerate(value))
    if isinstance(value, type | nn.Module) or module_of(type(value)).partition(".")[0] in _NOT_SEARCHED:
        return None
    slots = [s for base in type(value).__mro__ for s in _names(base.__dict__.get("__slots__", ()))]
    found = {s: getattr(value, s) for s in slots if s not in ("__dict__", "__weakref__") and hasattr(value, s)}
    return {**getattr(value, "__dict__", {}), **found} or None


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _refill(value: Any, items: dict[Any, Any]) -> None:
    """Makes `items` the content of a container or an object, if its content differs."""
    present = _items_of(value) or {}
    if _identical(list(present.items()), list(items.items())) or isinstance(value, tuple):
        return
    if isinstance(value, dict):
        value.clear()
        value.update(items)
    elif isinstance(value, list | deque):
        value.clear()
        value.extend(items.values())
    else:
        for name in present.keys() - items.keys():
            object.__delattr__(value, name)
        for name, item in items.items():
            if present.get(name, items) is not item:
                object.__setattr__(value, name, item)


def _identical(some: list[tuple[Any, Any]], others: list[tuple[Any, Any]]) -> bool:
    """Returns True for the same keys with the same objects."""
    return (
        len(some) == len(others)
        and all(a[0] == b[0] for a, b in zip(some, others, strict=True))
        and all(map(operator.is_, (v for _, v in some), (v for _, v in others)))
    )


def _equal(some: Any, other: Any) -> bool:
    """Returns True for equal states of arrays and generators, which may hold arrays themselves."""
    if isinstance(some, dict):
        return (
            isinstance(other, dict)
            and some.keys() == other.keys()
            and all(_equal(v, other[k]) for k, v in some.items())
        )
    if isinstance(some, torch.Tensor | np.ndarray):
        return some.shape == other.shape and bool((some == other).all() or _bytes(some) == _bytes(other))
    return type(some) is type(other) and some == other


def _bytes(array: Any) -> bytes:
    return (array.numpy() if isinstance(array, torch.Tensor) else array).tobytes()  # NaN equals itself


# ---- differences


def difference(before: Copy, value: Any, as_sent: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    """Returns what has changed from `before` to `value`, for `apply_difference`; None if nothing has.

    Args:
        before: A copy of the object.
        value: The object now, or another one in its place.
        as_sent: Returns a tensor in the form in which it is sent.
    """
    now = Copy(value)
    if before.same_as(now):
        return None
    if value is not before.value or isinstance(value, (*_PLAIN, tuple)):
        return ("new", map_leaves(as_sent, value))
    if isinstance(value, torch.Tensor):
        return ("written", as_sent(value))
    if _kind_of(value) is not None:
        return ("state", now.state)
    olds, news = before.values(), now.values()
    if not isinstance(value, list | deque):
        found = {}
        for key, new in news.items():
            old = before.inside.get(key) if before.inside is not None else Copy(olds.get(key, olds), 0)
            change = ("new", map_leaves(as_sent, new)) if old is None else difference(old, new, as_sent)
            if change is not None:
                found[key] = change
        return ("items", found, [k for k in olds if k not in news])
    kept = len(olds) if before.inside is None else _unchanged(before.inside, now.inside or {})
    if len(news) >= kept == len(olds) and _identical(list(olds.items()), list(news.items())[:kept]):
        return ("tail", kept, [map_leaves(as_sent, v) for v in list(value)[kept:]])
    return ("tail", 0, [map_leaves(as_sent, v) for v in value])


def _unchanged(before: dict[Any, Copy], now: dict[Any, Copy]) -> int:
    """Returns how many items at the beginning have not changed."""
    return next((i for i, old in before.items() if i not in now or not old.same_as(now[i])), len(before))


def apply_difference(value: Any, change: tuple[Any, ...]) -> Any:
    """Changes `value`, whose content is that of `before`, by the result of `difference`; returns what replaces it."""
    kind, new = change[:2]
    if kind == "new":
        return new
    if kind == "written":
        with torch.no_grad():
            value.copy_(new)
    elif kind == "state":
        _KINDS[next(base for base in _KINDS if isinstance(value, base))].write(value, new)
    elif kind == "tail":
        items = [*list(value)[:new], *change[2]]
        value.clear()
        value.extend(items)
    else:
        items = {k: v for k, v in (_items_of(value) or {}).items() if k not in change[2]}
        for key, inner in new.items():
            items[key] = apply_difference(items.get(key), inner)
        _refill(value, items)
    return value


def map_leaves(function: Callable[[Any], Any], value: Any, depth: int = _DEPTH) -> Any:
    """Returns `value` with `function` of every tensor; objects with such a tensor are copied, all others stay."""
    if isinstance(value, torch.Tensor):
        return function(value)
    items = None if isinstance(value, _PLAIN) or _kind_of(value) is not None else _items_of(value)
    if not items or not depth:
        return value
    mapped = {k: map_leaves(function, v, depth - 1) for k, v in items.items()}
    if all(mapped[k] is v for k, v in items.items()):
        return value
    if isinstance(value, tuple):
        return type(value)(*mapped.values()) if hasattr(value, "_fields") else tuple(mapped.values())
    new = copy.copy(value)
    _refill(new, mapped)
    return new


def replace_leaves(function: Callable[[Any], Any], value: Any, depth: int = _DEPTH) -> Any:
    """Replaces every tensor in `value` by `function` of it, in the same objects; returns what replaces `value`."""
    if isinstance(value, torch.Tensor):
        return function(value)
    items = None if isinstance(value, _PLAIN) or _kind_of(value) is not None else _items_of(value)
    if not items or not depth:
        return value
    replaced = {k: replace_leaves(function, v, depth - 1) for k, v in items.items()}
    if isinstance(value, tuple):
        return value if all(replaced[k] is v for k, v in items.items()) else map_leaves(function, value)
    _refill(value, replaced)
    return value
