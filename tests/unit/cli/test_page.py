"""docs/cli.md shows what the commands print."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from lightning_hybrid.cli import machine, main
from tests.documents import ROOT, blocks, write_files

PAGE = ROOT / "docs/cli.md"


def _examples() -> list[tuple[str, str]]:
    """Returns the commands that follow a `$`, each with its output."""
    texts = [block.text for block in blocks(PAGE) if not block.kind]
    return [(c, out) for text in texts for c, out in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)]


@pytest.fixture
def _files_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hybrid"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for name in machine.launcher_variables():
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    write_files(PAGE, tmp_path)


@pytest.mark.usefixtures("_files_of_the_page")
@pytest.mark.parametrize(("command", "output"), _examples(), ids=lambda value: value[:60].strip())
def test_an_example(
    command: str, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    assert words[0] == "lightning-hybrid"
    if output.startswith("error: ") or "problems" in output:
        with pytest.raises(SystemExit):
            main(words[1:])
    else:
        main(words[1:])
    captured = capsys.readouterr()
    *_, expected = output.split("...\n")
    assert (captured.out + captured.err).endswith(expected)
