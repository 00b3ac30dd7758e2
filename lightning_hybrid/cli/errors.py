"""Errors of the command line: one paragraph, with the nearest name that exists."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn

from typing_extensions import override


class CommandError(Exception):
    """Ends a command with its message as the last paragraph of the output."""

    status = 1


class UsageError(CommandError):
    """The arguments or the configuration are wrong."""

    status = 2


def did_you_mean(name: str, names: Iterable[str], ticks: str = "`") -> str:
    """Returns `Did you mean ...?` with the nearest of `names`, or an empty text if none is near."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    # of long names with dots, a wrong part counts more than what the others have in common
    if not near and "." in name:
        last = name.rpartition(".")[2]
        near = [n for n in names if difflib.get_close_matches(last, [n.rpartition(".")[2]], cutoff=0.75)]
    return f"Did you mean {ticks}{near[0]}{ticks}?" if near else ""


def paragraph(message: str) -> str:
    """Returns `message` without line breaks and repeated spaces."""
    return re.sub(r"\s+", " ", message).strip()


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without abbreviations, whose errors are a `UsageError`."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    @override
    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: ([^\s=]+)", message)
        if unknown:
            options = re.findall(r"--\w+", self.format_usage())
            message = f"unknown argument `{unknown[1]}`. {did_you_mean(unknown[1], options)}"
        message = in_words(message)
        end = "" if message.rstrip().endswith(("?", ".")) else "."
        raise UsageError(f"{message.strip()}{end} See `{self.prog} --help`.")


def in_words(message: str) -> str:
    """Returns an error of argparse with the argument in backticks, the rule and the value."""
    if found := re.match(r"argument (?:-\w/)?(\S+): (.*)", message):
        name, problem = found[1], found[2]
        if problem.startswith("expected one argument"):
            return f"`{name}` needs a value."
        if value := re.match(r"invalid (\w+) value: '(.*)'", problem):
            return f"`{name}` must be {value[1]}. Got {value[2]!r}."
        if value := re.match(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", problem):
            choices = re.findall(r"[\w-]+", value[2])
            return f"`{name}` must be one of {', '.join(choices)}. Got {value[1]!r}. {did_you_mean(value[1], choices)}"
    if found := re.match(r"the following arguments are required: (.*)", message):
        return f"{' and '.join(f'`{name}`' for name in found[1].split(', '))} must be given."
    return message
