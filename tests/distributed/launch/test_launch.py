"""The strategy under the launchers that people use: Lightning's own, torchrun, and the name in the registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import run_python, run_warm

SCRIPT = Path(__file__).with_name("train_script.py")
TIMEOUT_SECONDS = 90.0
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
LAUNCHERS = ["lightning", pytest.param("torchrun", marks=pytest.mark.slow)]


def _run(*command: str) -> tuple[int, str]:
    return run_python(*command, timeout_seconds=TIMEOUT_SECONDS)


def _run_by(launcher: str, folder: Path, *arguments: str) -> tuple[int, str]:
    """Trains on two ranks; those of Lightning's launcher have everything imported already."""
    command = (str(SCRIPT), "--out", str(folder), *arguments)
    if launcher == "torchrun":
        return _run(*TORCHRUN, *command)
    return run_warm(*command, processes=2, cwd=folder, timeout_seconds=TIMEOUT_SECONDS)


def _results(folder: Path, code: int, output: str) -> list[dict[str, Any]]:
    assert code == 0, output
    files = sorted(folder.glob("rank*.json"))
    assert [file.name for file in files] == ["rank0.json", "rank1.json"], output
    return [json.loads(file.read_text()) for file in files]


def _check(results: list[dict[str, Any]], times: int = 1) -> None:
    assert len({result["pid"] for result in results}) == 2
    assert {result["strategy"] for result in results} == {"HybridStrategy"}
    for result in results:
        assert result["metrics"] == results[0]["metrics"]
        assert len(result["metrics"]) == times
        assert all(metrics == pytest.approx(result["metrics"][0]) for metrics in result["metrics"])
        assert {"train_loss", "val_bits"} <= set(result["metrics"][0])


@pytest.mark.slow
def test_lightning_launcher(tmp_path: Path) -> None:
    code, output = _run(str(SCRIPT), "--layout", "pp2", "--out", str(tmp_path))
    _check(_results(tmp_path, code, output))


def test_trainers_one_after_another(tmp_path: Path) -> None:
    """Ranks that exist already serve the second Trainer."""
    code, output = _run_by("lightning", tmp_path, "--layout", "pp2", "--times", "2")
    _check(_results(tmp_path, code, output), times=2)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    code, output = _run(*TORCHRUN, str(SCRIPT), "--layout", "tp2", "--times", "2", "--out", str(tmp_path))
    _check(_results(tmp_path, code, output), times=2)


def test_registry_name(tmp_path: Path) -> None:
    """Without a layout: fsdp over all devices."""
    code, output = _run_by("lightning", tmp_path, "--strategy", "hybrid")
    _check(_results(tmp_path, code, output))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_plan_is_printed_once(launcher: str, tmp_path: Path) -> None:
    code, output = _run_by(launcher, tmp_path, "--layout", "pp2")
    assert code == 0, output
    assert output.count("predicted bubble") == 1, output
    assert "blocks.1" in output, output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_error_is_shown_once(launcher: str, tmp_path: Path) -> None:
    """Every rank ends, and the message stands once in the output of the ranks."""
    code, output = _run_by(launcher, tmp_path, "--layout", "dp2-pp2")
    assert code != 0
    assert output.count("`layout` must use every device once") == 1, output
