"""Class paths that cannot be imported, and parameters that classes do not have, with the nearest that exist."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
import traceback
import typing
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_hybrid.cli.errors import did_you_mean

_MODULES = (
    *("lightning_hybrid", "lightning_hybrid.callbacks", "lightning_hybrid.models", "lightning_hybrid.data"),
    *("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies"),
    *("torch.optim", "torch.optim.lr_scheduler"),
)
"""Modules whose classes a configuration usually names."""


def import_problem(class_path: str, problem: str) -> str | None:
    """Explains why `class_path` cannot be imported; None if that is not the problem."""
    if found := re.search(r"No module named '([^']+)'", problem):
        if not f"{class_path}.".startswith(f"{found[1]}."):
            return f"the module of `{class_path}` cannot be imported: {problem.strip().splitlines()[0]}."
        return f"there is no module `{found[1]}` for `{class_path}`. {nearest_class(class_path)}"
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", problem):
        return f"`{found[1]}` has no `{found[2]}`. {nearest_class(class_path)}"
    return None


def nearest_class(class_path: str) -> str:
    """Returns `Did you mean ...?` with the class path that exists and is nearest, or an empty text."""
    corrected = _corrected(class_path)
    return f"Did you mean `{corrected}`?" if corrected and corrected != class_path else ""


def nearest_name(name: str) -> str:
    """Returns `Did you mean ...?` for the name of a class without its module."""
    paths = [f"{m}.{n}" for m in _MODULES if (module := _imported(m)) for n in getattr(module, "__all__", dir(module))]
    near = _nearest(name, [path.rpartition(".")[2] for path in paths])
    found = next((path for path in paths if path.endswith(f".{near}")), None)
    return f"Did you mean `{found}`?" if found else ""


def is_class(path: str) -> bool:
    """Returns True for the path of a class that can be imported."""
    return re.fullmatch(r"[\w.]+\.\w+", path) is not None and isinstance(_imported_class(path), type)


def import_error(class_path: str) -> str | None:
    """Returns the error that the module of `class_path` raises when it is imported, or None."""
    try:
        importlib.import_module(class_path.rpartition(".")[0])
    except Exception as error:  # noqa: BLE001 -- whatever a module does at its import
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        at = (
            f" ({frames[-1].filename}:{frames[-1].lineno})" if frames[1:] and not isinstance(error, SyntaxError) else ""
        )
        return f"{type(error).__name__}: {error}{at}"
    return None


def _corrected(path: str) -> str | None:
    """Returns the path of a module, class or function that exists and is near `path`, or None."""
    parent, _, name = path.rpartition(".")
    if not parent:
        return _nearest(name, _top_level())
    found = _corrected(parent)
    module = _imported(found) if found else None
    if module is None:
        return None
    names = {n for n in dir(module) if not n.startswith("_")} | {m.name for m in _submodules(module)}
    near = name if name in names else _nearest(name, getattr(module, "__all__", ())) or _nearest(name, names)
    return f"{found}.{near}" if near else None


def _nearest(name: str, names: Iterable[str]) -> str | None:
    names = list(names)
    if name in names:
        return name
    found = re.search(r"`(.+)`", did_you_mean(name, names))
    return found[1] if found else None


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception:  # noqa: BLE001 -- whatever a module does at its import
        return None


def _submodules(module: ModuleType) -> Iterable[pkgutil.ModuleInfo]:
    return pkgutil.iter_modules(getattr(module, "__path__", []))


def _top_level() -> list[str]:
    here = [file.stem if file.suffix == ".py" else file.name for file in Path().iterdir()]
    return [*(name for name in here if name.isidentifier()), *(name for name in sys.modules if "." not in name)]


def unknown_parameter(class_path: str, group: str | None, name: str) -> str:
    """Explains a parameter that a class, or its parameter `group`, does not have."""
    if name == "class_path":
        return f"beside `class_path` there can be `init_args` only. Another key is there, too, for `{class_path}`."
    found = _imported_class(class_path)
    owner = class_path
    if group is not None and found is not None:
        found = _type_of_parameter(found, group)
        owner = f"{class_path}({group}=...)"
    return f"`{owner}` has no parameter `{name}`. {did_you_mean(name, _parameters(found))}"


def _imported_class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(_imported(module) if module else None, name, None)


def _type_of_parameter(kind: Any, name: str) -> Any:
    """Returns the dataclass that is the type of a parameter, or one of its types."""
    try:
        hint = typing.get_type_hints(kind.__init__).get(name)
    except Exception:  # noqa: BLE001 -- hints are any code of the user
        return None
    return next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)


def _parameters(kind: Any) -> list[str]:
    """Returns the names of the parameters of a class and its bases."""
    names: dict[str, None] = {}
    for base in getattr(kind, "__mro__", ()):
        if "__init__" in vars(base) and base is not object:
            names |= dict.fromkeys(n for n in inspect.signature(base.__init__).parameters if n != "self")
    return list(names)
