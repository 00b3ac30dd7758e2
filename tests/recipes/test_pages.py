"""The commands of the quickstart and of the page after it, one after the other, in an empty folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_hybrid import Layout
from tests.documents import ROOT, commands, write_files
from tests.scripts import run_warm

PAGES = [ROOT / "docs/quickstart.md", ROOT / "docs/after-training.md"]
pytestmark = pytest.mark.timeout(1200)


def _run(command: str, folder: Path) -> str:
    """Runs a command of a page, on as many processes as the layout that it names has."""
    program, *words = shlex.split(command)
    processes = max([1, *(Layout.parse(word).devices for word in words if re.fullmatch(r"[a-z]+\d.*", word))])
    arguments = words if program == "python" else ["-m", "lightning_hybrid.cli", *words]
    code, output = run_warm(*arguments, processes=processes, cwd=folder, timeout_seconds=600)
    (folder / "output").unlink()
    assert code == 0, output[-5000:]
    return output


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_pages_from_an_empty_folder(tmp_path: Path, whole: bool) -> None:
    """The quick variant trains for a few steps in one layout."""
    for page in PAGES:
        write_files(page, tmp_path)
    if not whole:
        for path in tmp_path.glob("*.py"):
            path.write_text(re.sub(r"max_epochs=\d", "max_steps=3", path.read_text()))
    losses: dict[str, float] = {}
    for page in PAGES:
        for command in commands(page):
            if whole or not re.search(r"train.py (?!dp2-pp2)|resume|plain", command):
                losses |= {a: float(b) for a, b in re.findall(r"(\S+): loss ([\d.]+)", _run(command, tmp_path))}
    if whole:
        assert losses.keys() == {"dp2-pp2", "tp2-pp2", "fsdp4", "dp1"}
        assert max(losses.values()) == pytest.approx(min(losses.values()), rel=1e-2)
    assert max(losses.values()) < (2.5 if whole else 5.5)
