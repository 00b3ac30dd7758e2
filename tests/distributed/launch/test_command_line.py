"""`lightning-hybrid fit` on two ranks, with modules of the current folder: the page's example, and how runs end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import ROOT, write_files
from tests.scripts import run_warm

PAGE = ROOT / "docs/cli.md"
TIMEOUT_SECONDS = 90.0
OTHERS = """
class Small(Classifier):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 2))


class Wrong(Classifier):
    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return self.layers(inputs.T)
"""


def _fit(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """Runs the command on files of the page; returns the exit code and the lines of the output without ranks."""
    write_files(PAGE, folder)
    with (folder / "my_module.py").open("a") as file:
        file.write(OTHERS)
    command = ("-m", "lightning_hybrid.cli", "fit", "--config", "my_run.yaml", *arguments)
    code, output = run_warm(*command, processes=2, cwd=folder, timeout_seconds=TIMEOUT_SECONDS)
    return code, [line for line in re.sub(r"^\[rank\d\]: ?", "", output, flags=re.MULTILINE).splitlines() if line]


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--trainer.strategy hybrid-pp2 --model.width 128"])
def test_the_example_trains(tmp_path: Path, options: str) -> None:
    code, lines = _fit(tmp_path, *options.split(), "--trainer.enable_progress_bar=false")
    assert code == 0, lines
    assert f"lightning-hybrid fit --config my_run.yaml {options}".strip() in PAGE.read_text().splitlines()
    assert any("max_steps=20" in line and "reached" in line for line in lines)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert checkpoint.is_dir()


def test_a_refused_run_ends_with_its_message(tmp_path: Path) -> None:
    code, lines = _fit(tmp_path, "--trainer.strategy=hybrid-pp2", "--model=my_module.Small")
    assert code == 1
    assert lines[-1].startswith("error: `layout='pp2'`"), lines[-30:]
    assert lines[-1].endswith("such as 'dp2' or 'fsdp2'.")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow
def test_an_error_of_the_step_keeps_its_line(tmp_path: Path) -> None:
    code, lines = _fit(tmp_path, "--model=my_module.Wrong")
    assert code == 1
    assert "mat1 and mat2 shapes cannot be multiplied" in lines[-1]
    assert any(line.lstrip().startswith(f'File "{tmp_path}/my_module.py", line') for line in lines)
    trace = lines[max(i for i, line in enumerate(lines) if line.startswith("Traceback")) :]
    assert len(trace) < 12, trace
    assert sum("frames of Lightning and torch" in line for line in trace) in (1, 2)
