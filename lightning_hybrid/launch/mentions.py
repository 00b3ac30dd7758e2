"""Finds what the user's code mentions, without running it."""

from __future__ import annotations

from collections.abc import Iterable
from types import CodeType, FunctionType
from typing import Any

_OWN_PACKAGES = ("lightning.", "pytorch_lightning.", "lightning_hybrid.", "torch.")


def mentions(objects: Iterable[Any], name: str) -> bool:
    """Returns True if user code of the classes of `objects`, or of functions called there, mentions `name`."""
    seen: set[int] = set()
    functions = [f for obj in objects for f in _functions_of(obj)]
    while functions:
        function = functions.pop()
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


def _functions_of(obj: Any) -> list[Any]:
    """Returns the functions of an object's classes by the user, and those among its attributes."""
    found: list[Any] = []
    for cls in type(obj).__mro__:
        if _is_ours(cls):
            continue
        for value in vars(cls).values():
            found += [value.fget] if isinstance(value, property) else [getattr(value, "__func__", value)]
    found += [getattr(value, "__func__", value) for value in vars(obj).values() if callable(value)]
    return [getattr(f, "__wrapped__", f) for f in found]


def _is_ours(definition: Any) -> bool:
    return str(getattr(definition, "__module__", "")).startswith(_OWN_PACKAGES)


def _names(code: CodeType) -> set[str]:
    """Returns the names and texts in the code of a function and the functions inside."""
    found = set(code.co_names) | {c for c in code.co_consts if isinstance(c, str)}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= _names(inner)
    return found
