"""Iterators that can go back: a trial of a step must not use up what the user's iterators give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import GeneratorType
from typing import Any

from lightning_hybrid._torch_private import LoaderIterator

_CONTAINERS = ([], (), {}, {}.values(), {}.items(), set(), "", range(0))
_KINDS = {
    GeneratorType,
    map,
    filter,
    enumerate,
    zip,
    reversed,
    type(reversed([])),
    *(type(iter(v)) for v in _CONTAINERS),
}
_ITERTOOLS = itertools.__name__


class _Item:
    """An item that an iterator has given, and the following one."""

    __slots__ = ("following", "value")

    def __init__(self, value: Any) -> None:
        self.value, self.following = value, None


class Rewindable(Iterator):
    """An iterator over the items of `source` that can be set back to an earlier position.

    Items are kept as long as a position before them is.

    Args:
        source: The iterator, which nothing else should use from now on.
    """

    def __init__(self, source: Iterator) -> None:
        self._source = source
        self.position: Any = _Item(None)
        """The item that was given last. It can be set to an earlier one."""

    def __next__(self) -> Any:
        if self.position.following is None:
            self.position.following = _Item(next(self._source))
        self.position = self.position.following
        return self.position.value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_source"], name)


def is_consumable(value: Any) -> bool:
    """Returns True for an iterator of Python or torch, which cannot be copied or set back."""
    kind = type(value)
    return kind in _KINDS or kind.__module__ == _ITERTOOLS or isinstance(value, LoaderIterator)
