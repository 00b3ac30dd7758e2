"""Variables outside of a module that its code names: global ones, those of enclosing functions, and classes."""

from __future__ import annotations

import inspect
import random
import sys
import sysconfig
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, MutableMapping
from functools import cache
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_hybrid.ghosts.contract import StatePlace
from lightning_hybrid.ghosts.rewind import is_consumable
from lightning_hybrid.spec.code import module_of

_STATE = (
    *(int, float, bool, str, list, dict, set, deque, defaultdict, OrderedDict, Counter, torch.Tensor, np.ndarray),
    *(torch.Generator, random.Random, np.random.Generator, np.random.RandomState),
)
"""Types of variables that are state; a subclass, such as a registry of a package, is not."""
_OF_PYTHON = sysconfig.get_path("stdlib")


class Outside:
    """Variables that the code of classes names, if the user has written it: code of installed packages is left out.

    Args:
        classes: The classes of the user's modules.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        self._variables: dict[str, MutableMapping[str, Any]] = {}
        self._names: dict[str, set[str]] = {}
        self.classes: dict[type, None] = {}
        """Classes that the code names."""
        functions = [f for kind in classes for f in vars(kind).values()]
        seen: set[int] = set()
        while functions:
            function = _plain(functions.pop())
            code = getattr(function, "__code__", None)
            if code is None or id(code) in seen or "-packages" in code.co_filename:
                continue
            seen.add(id(code))
            functions += self._take(f"module {_module(function)}", function.__globals__, names_in(code))
            cells = _Cells(dict(zip(code.co_freevars, function.__closure__ or (), strict=True)))
            functions += self._take(f"function {function.__qualname__}", cells, code.co_freevars)

    def _take(self, owner: str, variables: MutableMapping[str, Any], names: Iterable[str]) -> list[Any]:
        """Takes variables that are state; returns functions, and those of the classes of objects."""
        functions = []
        for name in names:
            value = variables.get(name)
            if isinstance(value, FunctionType):
                functions.append(value)
            elif isinstance(value, type):
                if module_of(value) == variables.get("__name__", "") and not issubclass(value, nn.Module):
                    self.classes[value] = None
            elif type(value) in _STATE or is_consumable(value) or _is_written_by_user(value):
                self._variables[owner] = variables
                self._names.setdefault(owner, set()).add(name)
                functions += vars(type(value)).values() if _is_written_by_user(value) else ()
        return functions

    def places(self) -> Iterator[tuple[StatePlace, Any]]:
        """Yields every variable with its value."""
        for owner, names in self._names.items():
            for name in sorted(names):
                yield StatePlace(owner, name), self._variables[owner].get(name)

    def variables(self, owner: str) -> MutableMapping[str, Any] | None:
        """Returns the variables of the owner of a place; None if it is another owner."""
        return self._variables.get(owner)


class _Cells(MutableMapping[str, Any]):
    """The variables of enclosing functions, by name."""

    def __init__(self, cells: dict[str, CellType]) -> None:
        self._cells = cells

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cells[name].cell_contents
        except ValueError:  # not assigned yet
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        self._cells[name].cell_contents = value

    def __delitem__(self, name: str) -> None:
        del self._cells[name].cell_contents

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)


def _is_written_by_user(value: Any) -> bool:
    """Returns True for an object, but no module, of a class in the user's own files or without a file."""
    if isinstance(value, nn.Module | ModuleType):
        return False
    name = module_of(type(value))
    module = sys.modules.get(name)
    if module is None or name == "__main__":  # of `exec`, a prompt, a notebook or a script
        return True
    file = getattr(module, "__file__", None)
    return file is not None and "-packages" not in file and not file.startswith(_OF_PYTHON)


def _plain(value: Any) -> Any:
    """Returns the function of a property, class method, static method or decorated function."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return inspect.unwrap(value) if isinstance(value, FunctionType) else value


def _module(function: Any) -> str:
    name = str(function.__module__)  # None in code that `exec` runs without a `__name__`
    return name.replace("__mp_main__", "__main__")  # as started processes call the user's script


@cache
def names_in(code: CodeType) -> frozenset[str]:
    """Returns the names of attributes and global variables in the code of a function and the functions inside."""
    inner = [names_in(c) for c in code.co_consts if isinstance(c, CodeType)]
    return frozenset(code.co_names).union(*inner)
