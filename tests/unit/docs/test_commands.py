"""Every command of the documentation is understood by the program that it names; most of them run."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run

from lightning_hybrid import compare_layouts
from lightning_hybrid.cli import checkpoints, main
from lightning_hybrid.cli.commands import COMMANDS
from lightning_hybrid.compare_layouts import VerifyReport
from tests.documents import PAGES, ROOT, Block, blocks, commands, write_files

TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
ELSEWHERE = ("apt-get", "cd", "mkdir")
"""Commands that belong to other programs, and are not run."""


class _Understood(Exception):
    """The arguments of a program have been read."""


@pytest.fixture(autouse=True)
def _nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons and checkpoints end once their arguments, modules and data are there."""
    monkeypatch.setattr(compare_layouts, "verify", lambda *_, **__: VerifyReport(layouts=()))
    monkeypatch.setattr(checkpoints, "_call", lambda *_: "")
    monkeypatch.setattr(sys, "argv", ["lightning-hybrid"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def _hybrid(words: list[str]) -> None:
    """`lightning-hybrid`: training prints its configuration instead."""
    training = words[:1] and words[0] in ("fit", "validate", "test", "predict")
    shown = training and any(word.endswith("help") for word in words)
    try:
        main([*words, "--print_config"] if training and not shown else words)
    except SystemExit as end:
        assert not end.code, words  # noqa: PT017 -- argparse ends so, too, after `--help`


def _python(words: list[str]) -> None:
    """Python: a module of the repository up to its arguments; a file of the page."""
    if words[0] != "-m":
        assert Path(words[0]).exists(), words
        return
    if words[1] == "lightning_hybrid.cli":
        _hybrid(words[2:])
        return
    if words[1] == "pytest":
        _pytest(words[2:])
        return
    understood = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        understood(parser, *args, **kwargs)
        raise _Understood

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[1:])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(_Understood):
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def _pytest(words: list[str]) -> None:
    """pytest: its files are there."""
    for word in words:
        if re.match(r"[\w/]+(\.py|/\w+)", word):
            assert (ROOT / word).exists(), word


def _pip(words: list[str]) -> None:
    """pip: extras and files are there."""
    for extra in ",".join(re.findall(r"\[([\w,]+)\]", " ".join(words))).split(","):
        assert not extra or extra in EXTRAS, words
    for option, value in zip(words, words[1:], strict=False):
        assert option not in ("-c", "-r", "--constraint") or (ROOT / value).exists() or value.startswith("https:"), (
            words
        )


def _make(words: list[str]) -> None:
    """Make: the targets are there."""
    assert set(words) <= TARGETS, words


def _torchrun(words: list[str]) -> None:
    """torchrun: its own arguments, and a file of the page or a program."""
    options = torch.distributed.run.get_args_parser().parse_args(words)
    if options.no_python:
        PROGRAMS[options.training_script](options.training_script_args)
    else:
        _python([options.training_script, *options.training_script_args])


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "lightning-hybrid": _hybrid,
    "make": _make,
    "mkdocs": lambda words: None,
    "pip": _pip,
    "pre-commit": lambda words: None,
    "pytest": _pytest,
    "python": _python,
    "torchrun": _torchrun,
}


def _commands() -> list[tuple[Path, str]]:
    return [(page, command) for page in PAGES for command in dict.fromkeys(commands(page))]


@pytest.mark.filterwarnings("ignore:'tests.benchmarks.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("page", "command"), _commands(), ids=lambda value: str(value)[-60:])
def test_a_command_is_understood(
    page: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "recipes", tmp_path / "recipes")
    write_files(page, tmp_path)
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    program = Path(words[0]).name
    if program not in ELSEWHERE:
        PROGRAMS[program](words[1:])


def _configurations() -> list[tuple[Path, Block]]:
    return [(page, b) for page in PAGES for b in blocks(page) if b.kind == "yaml" and "trainer:\n" in b.text]


@pytest.mark.parametrize(("page", "block"), _configurations(), ids=lambda value: getattr(value, "name", ""))
def test_a_configuration_is_understood(
    page: Path, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts of a configuration override a recipe."""
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    (tmp_path / "part.yaml").write_text(block.text)
    _hybrid(["fit", "--config", str(ROOT / "recipes/quickstart.yaml"), "--config", "part.yaml"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_in_the_text_are_there(page: Path) -> None:
    names = {command.name for command in COMMANDS}
    assert set(re.findall(r"`lightning-hybrid ([a-z]+)", page.read_text())) <= names
