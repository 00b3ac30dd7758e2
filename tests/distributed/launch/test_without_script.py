"""Modules of code without a file: `python -c`, the standard input, a prompt, `exec`, and a file that is gone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_hybrid.launch import notebook
from tests.scripts import run_warm, script_environment

TIMEOUT_SECONDS = 150.0
CODE = '''
import lightning as L
import torch
from torch import nn

from lightning_hybrid import HybridStrategy, verify


class Counter:
    """An object of the user whose state the step changes."""

    def __init__(self):
        self.calls = 0


counter = Counter()


def activation(x):
    return torch.relu(x)


class Net(L.LightningModule):
    def __init__(self, mask=False):
        super().__init__()
        self.mask = mask
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def training_step(self, batch, index):
        inputs, labels = batch
        hidden = activation(self.first(inputs))
        if self.mask:
            hidden = hidden[hidden.sum(1) > 0]
        return nn.functional.cross_entropy(self.last(activation(self.second(hidden))), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader():
    inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(inputs, (inputs.sum(1) > 0).long())
    return torch.utils.data.DataLoader(data, batch_size=8)


def run(layout, devices, **options):
    torch.manual_seed(0)
    model = Net(**options)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=HybridStrategy(layout),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader())
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compare(layout):
    torch.set_num_threads(1)
    torch.testing.assert_close(run("dp1", 1), run(layout, 2))
    report = verify(Net(), loader(), layout)
    assert report.passed, report
    print(f"{layout} equals one process")
'''
PROGRAMS: dict[str, tuple[list[str], str | None]] = {
    "-c": (["-c", f"{CODE}\ncompare('pp2')"], None),
    "standard input": ([], f"{CODE}\ncompare('tp2')"),
    "prompt": (["-i"], "exec(open('code.txt').read())\ncompare('pp2')\n"),
    "file that is gone": (["gone.py"], None),
}
OWN_VARIABLES = """
variables = {}
exec(open("code.txt").read(), variables)
if __name__ == "__main__":
    weights = variables["run"]("LAYOUT", DEVICES)
    print("sum of squares:", weights.square().sum().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_ranks_of_a_program_that_cannot_be_started_again(name: str, tmp_path: Path) -> None:
    arguments, typed = PROGRAMS[name]
    (tmp_path / "code.txt").write_text(CODE)
    (tmp_path / "gone.py").write_text(f"import os\nos.remove(__file__)\n{CODE}\ncompare('pp2')")
    done = subprocess.run(
        [sys.executable, *arguments],
        input=typed,
        cwd=tmp_path,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert re.search("^(>>> )?[pt]p2 equals one process$", done.stdout, re.MULTILINE), done.stderr[-3000:]


@pytest.mark.parametrize("layout", ["pp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_classes_of_exec(layout: str, tmp_path: Path) -> None:
    sums = []
    for name, devices in (("dp1", 1), (layout, 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "code.txt").write_text(CODE)
        script = folder / "main.py"
        script.write_text(OWN_VARIABLES.replace("LAYOUT", name).replace("DEVICES", str(devices)))
        code, output = run_warm(str(script), processes=devices, timeout_seconds=TIMEOUT_SECONDS, cwd=folder)
        assert code == 0, output[-3000:]
        sums += [float(found) for found in re.findall("sum of squares: (.*)", output)]
    assert len(sums) == 3
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)


VERIFY = """
variables = {}
exec(open("code.txt").read(), variables)
if __name__ == "__main__":
    print(variables["verify"](variables["Net"](), variables["loader"](), "pp2").passed)
"""


@pytest.mark.slow
def test_layouts_are_compared_for_classes_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text(CODE)
    script = tmp_path / "main.py"
    script.write_text(VERIFY)
    code, output = run_warm(str(script), processes=1, timeout_seconds=TIMEOUT_SECONDS, cwd=tmp_path)
    assert (code, output.splitlines()[-1]) == (0, "True"), output[-3000:]


@pytest.mark.slow
def test_a_refusal_names_the_line_of_code_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text(CODE)
    script = tmp_path / "main.py"
    script.write_text(OWN_VARIABLES.replace('"LAYOUT", DEVICES', '"pp2", 2, mask=True'))
    code, output = run_warm(str(script), processes=2, timeout_seconds=TIMEOUT_SECONDS, cwd=tmp_path)
    line = CODE.splitlines().index("            hidden = hidden[hidden.sum(1) > 0]") + 1
    assert code == 1
    assert f"<string>:{line} (training_step)" in output.splitlines()[-1]


def _launcher(nodes: int, externally: bool) -> Any:
    environment = SimpleNamespace(creates_processes_externally=externally)
    return SimpleNamespace(num_processes=2, num_nodes=nodes, cluster_environment=environment)


def test_scripts_and_ranks_of_other_launchers_are_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "NotebookLauncher", lambda strategy, ranks: "forked")
    for started_again, externally, forked in ((True, False, False), (False, True, False), (False, False, True)):
        monkeypatch.setattr(notebook, "can_start_again", lambda known=started_again: known)
        ranks = _launcher(1, externally)
        assert notebook.launcher_here(None, ranks) == ("forked" if forked else ranks)
    with pytest.raises(ValueError, match="`num_nodes` must be 1 in code without a script.* Got 2."):
        notebook.launcher_here(None, _launcher(2, externally=False))
