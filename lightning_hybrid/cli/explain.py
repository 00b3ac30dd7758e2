"""Errors of jsonargparse in one sentence, with the line of the configuration and the nearest name that exists."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lightning_hybrid.cli.class_paths import import_error, import_problem, nearest_name, unknown_parameter
from lightning_hybrid.cli.configs import Configs
from lightning_hybrid.cli.errors import did_you_mean, in_words, paragraph

_UNINFORMATIVE = re.compile(
    r"Subtypes: |Errors:|Does not validate|Given value|Expected an? (path but|<class|typing|.*Got value)"
    r"|Not a valid subclass|Subclass types expect|a (class path|dict) "
)
"""Beginnings of lines of jsonargparse about the types that it has tried."""
_REQUIRED = r"the following arguments are required: (.+)"
_LONGEST = 300
"""Characters of an error that is not understood."""


def explain(message: str, options: Iterable[str], configs: Configs) -> str:
    """Returns an error of jsonargparse as one paragraph.

    Args:
        message: The error.
        options: The options of the command, such as `--trainer.max_steps`.
        configs: The configuration files.
    """
    if found := re.match(r"\W*[Uu]nrecognized arguments: (\S+)", message):
        name = found[1].partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument `{name}`. Options begin with `--`."
        return f"unknown option `{name}`. {did_you_mean(name, options)}"
    if found := re.search(r"(?:Subcommand|Parser) .*does not accept option '([^']+)'|^Option '([^']+)'", message):
        return _unknown_key(found[1] or found[2], options, configs)
    if found := re.match(_REQUIRED, message):
        names = [name.rpartition(".")[2] for name in found[1].split(", ")]
        given = " and ".join(f"`{name}`" for name in sorted(names, reverse=True))
        return f"{given} must be given, in the file of `--config` or as an option such as `--{names[0]} CLASS_PATH`."
    if found := re.match(r"Parser key \"([^\"]+)\":", message):
        return _of_key(found[1], message[found.end() :], configs)
    return f"{in_words(paragraph(message))[:_LONGEST].strip().rstrip('.')}."


def _unknown_key(key: str, options: Iterable[str], configs: Configs) -> str:
    """Explains a key at the top of the configuration, or of the Trainer, that does not exist."""
    names = [option.removeprefix("--") for option in options]
    first = key.partition(".")[0]
    if first not in {name.partition(".")[0] for name in names}:
        key, names = first, [name for name in names if "." not in name]
    return f"{configs.place(key)}unknown key `{key}`. {did_you_mean(key, names)}"


def _of_key(key: str, body: str, configs: Configs) -> str:
    """Explains what is wrong with the value of `key`."""
    given = re.search(r"Given value: (.*)", body)
    value = None if given is None else _as_given(given[1].strip())
    body = body[: given.start()] if given else body
    class_path, problem = None, body
    for found in re.finditer(r"^( *)- Problem with given class_path '([^']+)':\s*", body, re.MULTILINE):
        # other types that were tried follow at the same indentation
        class_path, problem = found[2], re.split(rf"\n{found[1]}- ", body[found.end() :])[0]
    while inner := re.match(r"\s*Parser key \"([^\"]+)\":", problem):
        key, problem = f"{key}.{inner[1]}", problem[inner.end() :]
    if class_path is not None and (known := _of_class(key, class_path, problem, configs)):
        return known
    return f"{configs.place(key)}`{key}`{_of_value(value, problem)}"


def _as_given(text: str) -> str:
    """Returns a value as the user has written it, instead of the representation in Python."""
    nested = re.fullmatch(r"NestedArg\(key='[^']*', val=(.*)\)", text)
    text = nested[1] if nested else text
    quoted = re.fullmatch(r"(['\"])(.*)\1", text)
    return quoted[2] if quoted else text


def _of_class(key: str, class_path: str, problem: str, configs: Configs) -> str | None:
    """Explains a class that cannot be imported, or an unknown or missing parameter; None for another problem."""
    if found := re.search(r"Option '([^'.]+)[^']*' is not accepted", problem):
        return f"{configs.place(f'{key}.{found[1]}')}`{key}`: {unknown_parameter(class_path, None, found[1])}"
    if found := re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", problem):
        group, _, name = found[1].rpartition(".")
        return f"{configs.place(f'{key}.{found[1]}')}`{key}`: {unknown_parameter(class_path, group or None, name)}"
    if found := re.search(r"Group '([^']+)' does not accept option '([^']+)'", problem):
        return f"{configs.place(f'{key}.{found[2]}')}`{key}`: {unknown_parameter(class_path, found[1], found[2])}"
    if found := re.search(_REQUIRED, problem):
        names = found[1].split(", ")
        needed = " and ".join(f"`{name}`" for name in names)
        return f"{configs.place(key)}`{key}`: `{class_path}` needs {needed}, such as `--{key}.{names[0]} VALUE`."
    cause = import_problem(class_path, problem)
    return f"{configs.place(key)}`{key}`: {cause}" if cause else None


def _of_value(given: str | None, problem: str) -> str:
    """Explains a value of another type; follows the key."""
    if found := re.search(r"Unable to load config '(.*)'", problem):
        return f" must have options, such as `{{name: value}}`, or be a file of them. Got {found[1]!r}."
    if found := re.search(r"Import path does not correspond to a subclass of (\S+)", problem):
        return f": `{given}` is no {found[1]}."
    if found := re.search(r"Expected a dot import path string: (\w+)", problem):
        return (
            f": there is no class `{found[1]}`. {nearest_name(found[1]) or 'Write it with its module: `module.Class`.'}"
        )
    lines = [line.strip(" -") for line in problem.splitlines()]
    said = " ".join(line for line in lines if line and not _UNINFORMATIVE.match(line))
    if said and given and re.fullmatch(r"[A-Za-z_][\w.]*\.\w+", given) and (error := import_error(given)):
        return f": the module of `{given}` cannot be imported: {error}."
    value = found[1] if (found := re.search(r"Got value: (.*)", problem)) else given
    kinds = r"^\W*(?:Expected an? (?!path)|Not a valid subclass of )(.+?)(?:\. Got value: .*)?$"
    types = re.findall(kinds, problem, re.MULTILINE)
    types = [f"the class path of a {t}" if f"subclass of {t}" in problem else t for t in types]
    if types and value is not None and not said:
        return f" must be {_in_words(types)}. Got {value.strip()[:80]!r}. {_near(value, types)}"
    return f": {paragraph(said or problem)[:_LONGEST]}"


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
