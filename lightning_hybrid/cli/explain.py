"""Errors of jsonargparse in one sentence, with the line of the configuration and the nearest name that exists."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_hybrid.cli.configs import Configs
from lightning_hybrid.cli.errors import did_you_mean, paragraph

_UNINFORMATIVE = re.compile(
    r"Subtypes: |Errors:|Does not validate|Given value|Expected a path but|Not a valid subclass|Subclass types expect"
    r"|- a (class path|dict)"
)
"""Beginnings of lines of jsonargparse about the types that it has tried."""
_LONGEST = 300
"""Characters of an error that is not understood."""


def explain(message: str, options: Iterable[str], configs: Configs) -> str:
    """Returns an error of jsonargparse as one paragraph.

    Args:
        message: The error.
        options: The options of the command, such as `--trainer.max_steps`.
        configs: The configuration files.
    """
    if found := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        name = found[1].partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument `{name}`. Options begin with `--`."
        return f"unknown option `{name}`. {did_you_mean(name, options)}"
    if found := re.search(r"(?:Subcommand|Parser) .*does not accept option '([^']+)'|^Option '([^']+)'", message):
        return _unknown_key(found[1] or found[2], options, configs)
    if found := re.search(r"the following arguments are required: (.+)", message):
        names = [name.rpartition(".")[2] for name in found[1].split(", ")]
        given = " and ".join(f"`{name}`" for name in sorted(names, reverse=True))
        return f"{given} must be given, in the file of `--config` or as an option such as `--{names[0]} CLASS_PATH`."
    if found := re.match(r"Parser key \"([^\"]+)\":", message):
        return _of_key(found[1], message[found.end() :], configs)
    return paragraph(message)[:_LONGEST]


def _unknown_key(key: str, options: Iterable[str], configs: Configs) -> str:
    """Explains a key at the top of the configuration, or of the Trainer, that does not exist."""
    names = [option.removeprefix("--") for option in options]
    first = key.partition(".")[0]
    if first not in {name.partition(".")[0] for name in names}:
        key, names = first, [name for name in names if "." not in name]
    return f"{configs.place(key)}unknown key `{key}`. {did_you_mean(key, names)}"


def _of_key(key: str, body: str, configs: Configs) -> str:
    """Explains what is wrong with the value of `key`."""
    given = re.search(r"Given value: (.*)", body, re.DOTALL)
    body = body[: given.start()] if given else body
    class_path, problem = None, body
    for found in re.finditer(r"Problem with given class_path '([^']+)':\s*", body):
        class_path, problem = found[1], re.split(r"\n *- (?=Expected a|Not a valid)", body[found.end() :])[0]
    while inner := re.match(r"\s*Parser key \"([^\"]+)\":", problem):
        key, problem = f"{key}.{inner[1]}", problem[inner.end() :]
    if class_path is not None and (found := re.search(r"Option '([^'.]+)[^']*' is not accepted", problem)):
        return f"{configs.place(f'{key}.{found[1]}')}`{key}`: {_unknown_parameter(class_path, None, found[1])}"
    if class_path is not None and (found := re.search(r"Group '([^']+)' does not accept option '([^']+)'", problem)):
        return f"{configs.place(f'{key}.{found[2]}')}`{key}`: {_unknown_parameter(class_path, found[1], found[2])}"
    place = configs.place(key)
    if class_path is not None and (cause := _import_problem(class_path, problem)):
        return f"{place}`{key}`: {cause}"
    if "Import path does not correspond to a subclass of" in problem and given:
        return f"{place}`{key}`: `{given[1].strip()}` is no {problem.rpartition('subclass of')[2].split()[0]}."
    value = re.search(r"Got value: (.*)", problem) or given
    types = re.findall(r"Expected an? (?!path)(.+?)(?:\. Got value: .*)?$", problem, re.MULTILINE)
    if types and value:
        return f"{place}`{key}` must be {_in_words(types)}. Got {value[1].strip()[:80]!r}. {_near(value[1], types)}"
    lines = [line.strip(" -") for line in problem.splitlines()]
    said = " ".join(line for line in lines if line and not _UNINFORMATIVE.match(line))
    return f"{place}`{key}`: {paragraph(said or body)[:_LONGEST]}"


# ---- types and values


def _in_words(types: list[str]) -> str:
    words = [word for kind in types for word in _alternatives(kind)]
    *others, last = dict.fromkeys("null" if word == "NoneType" else word for word in words)
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(kind: str) -> list[str]:
    if kind.startswith("typing.Literal["):
        return kind.removeprefix("typing.Literal[").rstrip("]").split(", ")
    return [re.sub(r"<class '(.*?)'>", r"\1", kind).replace("typing.", "")]


def _near(value: str, types: list[str]) -> str:
    return did_you_mean(value.strip(), re.findall(r"'([^']+)'", " ".join(t for t in types if "Literal" in t)))


# ---- class paths and their parameters


def _import_problem(class_path: str, problem: str) -> str | None:
    """Explains why `class_path` cannot be imported; None if that is not the problem."""
    if found := re.search(r"No module named '([^']+)'", problem):
        if not f"{class_path}.".startswith(f"{found[1]}."):
            return f"the module of `{class_path}` cannot be imported: {problem.strip().splitlines()[0]}."
        return f"there is no module `{found[1]}` for `{class_path}`. {_nearest_class(class_path)}"
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", problem):
        return f"`{found[1]}` has no `{found[2]}`. {_nearest_class(class_path)}"
    return None


def _nearest_class(class_path: str) -> str:
    corrected = _corrected(class_path)
    return f"Did you mean `{corrected}`?" if corrected and corrected != class_path else ""


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


def _unknown_parameter(class_path: str, group: str | None, name: str) -> str:
    """Explains a parameter that a class, or its parameter `group`, does not have."""
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
