"""Finds what the user's code mentions, without running it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import CodeType, FunctionType
from typing import Any

_OWN_PACKAGES = ("lightning.", "pytorch_lightning.", "lightning_hybrid.", "torch.")


def mentions(objects: Iterable[Any], name: str) -> bool:
    """Returns True if user code of the classes of `objects`, or of functions called there, mentions `name`."""
    seen: set[int] = set()
    objects = list(objects)
    functions = [f for cls in dict.fromkeys(map(type, objects)) for f in _functions_of_class(cls)]
    functions += [getattr(f, "__func__", f) for obj in objects for f in vars(obj).values() if callable(f)]
    while functions:
        function = functions.pop()
        function = getattr(function, "__wrapped__", function)
        code = getattr(function, "__code__", None)
        if code is None or id(code) in seen or _is_ours(function):
            continue
        seen.add(id(code))
        names = _names(code)
        if name in names:
            return True
        known = getattr(function, "__globals__", {})
        functions += [f for n in names if isinstance(f := known.get(n), FunctionType)]
    return False


def functions_that_mention(objects: Iterable[Any], *names: str) -> list[Any]:
    """Returns the functions of the user's classes of `objects` that mention one of `names` themselves."""
    functions = [f for cls in dict.fromkeys(map(type, objects)) for f in _functions_of_class(cls)]
    codes = [(f, getattr(getattr(f, "__wrapped__", f), "__code__", None)) for f in functions]
    return [f for f, code in codes if code is not None and not _names(code).isdisjoint(names)]


def _functions_of_class(cls: type) -> list[Any]:
    """Returns the functions of a class by the user, and of its bases."""
    return [
        value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        for base in cls.__mro__
        if not _is_ours(base)
        for value in vars(base).values()
    ]


def _is_ours(definition: Any) -> bool:
    return str(getattr(definition, "__module__", "")).startswith(_OWN_PACKAGES)


@cache
def _names(code: CodeType) -> frozenset[str]:
    """Returns the names and texts in the code of a function and the functions inside."""
    found = set(code.co_names) | {c for c in code.co_consts if isinstance(c, str)}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= _names(inner)
    return frozenset(found)
