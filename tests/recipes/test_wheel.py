"""The wheel, as it is installed outside the repository."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.scripts import script_environment

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    (file,) = folder.glob("*.whl")
    return file


def test_recipes_are_in_the_wheel_and_tests_are_not(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for path in RECIPES.rglob("*.yaml"):
            packed = archive.read(f"lightning_hybrid/_recipes/{path.relative_to(RECIPES)}")
            assert packed == path.read_bytes()
    assert "lightning_hybrid/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_hybrid"}


def test_the_page_on_pypi(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = message_from_bytes(archive.read(name))
    links = re.findall(r"\]\(([^)\s]+)\)", str(metadata.get_payload()))
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert any(link.endswith("/blob/main/docs/layouts.md") for link in links)
    assert {"hf", "fp8", "plots", "recipes"} <= set(metadata.get_all("Provides-Extra") or [])
    kinds = {url.split(",")[0] for url in metadata.get_all("Project-URL") or []}
    assert kinds == {"Homepage", "Repository", "Documentation", "Changelog"}


def _run(installed: Path, cwd: Path, *command: str) -> str:
    environment = script_environment() | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_lists_copies_and_runs_recipes(wheel: Path, tmp_path: Path) -> None:
    installed, folder = tmp_path / "installed", tmp_path / "empty"
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=200)
    cli = ("-m", "lightning_hybrid.cli")
    place = _run(installed, folder, "-c", "import lightning_hybrid; print(lightning_hybrid.__file__)")
    assert place.startswith(str(installed))
    assert "quickstart " in _run(installed, folder, *cli, "recipes", "ls")
    _run(installed, folder, *cli, "recipes", "cp", "quickstart", "mine")
    assert (folder / "mine/quickstart.yaml").read_text() == (RECIPES / "quickstart.yaml").read_text()
    short = ("--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=1.0")
    layout = ("--trainer.devices=1", "--trainer.strategy.layout=dp1", "--trainer.callbacks=null")
    _run(installed, folder, *cli, "fit", "--config", "mine/quickstart.yaml", *short, *layout)
    (log,) = (folder / "runs/quickstart").rglob("config.yaml")
    assert "max_steps: 2" in log.read_text()
