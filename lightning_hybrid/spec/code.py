"""The code of classes, also of those without a file: of `python -c`, a prompt, a notebook or `exec`."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any


def module_of(kind: type) -> str:
    """Returns the name of the module of a class; empty if its code was run by `exec` without a `__name__`.

    Python says `builtins` then, as for `int` and for classes of extensions without a module.
    """
    name = str(kind.__module__)
    by_statement = "__module__" in vars(kind)
    return "" if name == "builtins" and by_statement else name


def file_hash(kind: type) -> str:
    """Returns a hash of the file that defines a class; empty if there is none."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


def code_hash(kind: type) -> str:
    """Returns a hash of the compiled functions of a class: equal in all processes of a version of Python."""
    parts: list[Any] = [kind.__qualname__]
    for name, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            parts += [name, *_parts_of(code)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _parts_of(code: CodeType) -> Iterator[Any]:
    yield code.co_code
    yield (*code.co_names, *code.co_varnames, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts_of(constant)
        else:
            yield sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
