"""Files of `--config`: recipes by name, missing files, syntax, and the line of a key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from lightning_hybrid.cli.errors import UsageError, did_you_mean
from lightning_hybrid.cli.recipe_files import recipes

_PLAIN_PATH = re.compile(r"[\w./~@+=,-][\w./~@+=, -]*")
"""A path on this machine; LightningCLI also takes URLs, and YAML instead of a file."""


class Configs:
    """The configuration files among the arguments of a command.

    Args:
        args: The arguments. A value of `--config` that is the name of a recipe is replaced by its file.

    Raises:
        UsageError: If a file is missing or is not YAML.
    """

    def __init__(self, args: list[str]) -> None:
        self.args = list(args)
        self._documents: list[tuple[Path, yaml.MappingNode]] = []
        for at, before, value in _values(args):
            if not _PLAIN_PATH.fullmatch(value):
                continue
            path = _file(value)
            self.args[at] = f"{before}{path}"
            self._documents.append((path, _read(path)))

    def place(self, key: str) -> str:
        """Returns the place of a key, such as `trainer.max_steps`, as `file.yaml:12: `, or an empty text.

        A key that an option sets has no place.
        """
        if any(arg.startswith(f"--{key}") for arg in self.args):
            return ""
        for path, document in reversed(self._documents):  # the last file has precedence
            line = _line(document, key)
            if line is not None:
                return f"{path}:{line}: "
        return ""


def _values(args: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yields each value of `--config`, with its position in `args` and what precedes it in the same argument."""
    for at, arg in enumerate(args):
        option, sign, value = arg.partition("=")
        if option == "--config" and sign:
            yield at, "--config=", value
        elif arg in ("--config", "-c") and at + 1 < len(args):
            yield at + 1, "", args[at + 1]


def _file(value: str) -> Path:
    path = Path(value).expanduser()
    if path.is_file():
        return path
    known = recipes() if not path.suffix else {}
    if value in known:
        return known[value]
    if path.is_dir():
        raise UsageError(f"`--config` must be a file. Got the folder {value}.")
    near = did_you_mean(path.name, _names_in(path.parent)) or did_you_mean(value, known)
    raise UsageError(f"`--config`: there is no file {value}. {near}")


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _read(path: Path) -> yaml.MappingNode:
    try:
        document = yaml.compose(path.read_text(), yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        begun = error.context_mark
        since = f", {error.context} that begins in line {begun.line + 1}" if error.context and begun else ""
        raise UsageError(f"{path}{at}: this is not YAML: {error.problem}{since}.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: this is not YAML: {error}") from None
    if not isinstance(document, yaml.MappingNode):
        raise UsageError(f"{path}: a configuration has keys such as `model:` and `trainer:`. This file has none.")
    for key, line, earlier in _repeated(document):
        raise UsageError(
            f"{path}:{line}: `{key}` is given twice, here and in line {earlier}, and only one would count. Remove one."
        )
    for key, value in document.value:
        if key.value == "trainer" and not isinstance(value, yaml.MappingNode):
            raise UsageError(
                f"{path}:{key.start_mark.line + 1}: `trainer` must have options, such as `max_steps: 10`. Got "
                f"{getattr(value, 'value', None)!r}."
            )
    return document


def _repeated(node: yaml.Node) -> Iterator[tuple[str, int, int]]:
    """Yields each key that a mapping has twice, with the lines of the second and the first one."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                yield str(key.value), line, seen[str(key.value)]
            seen[str(key.value)] = line
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated(value)


def _line(document: yaml.MappingNode, key: str) -> int | None:
    """Returns the line of the last part of `key` below the first one."""
    first, _, rest = key.partition(".")
    for name, value in document.value:
        if name.value == first:
            return next(_lines(value, rest.rpartition(".")[2]), None) if rest else name.start_mark.line + 1
    return None


def _lines(node: yaml.Node, name: str) -> Iterator[int]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == name:
                yield key.start_mark.line + 1
            yield from _lines(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _lines(value, name)
