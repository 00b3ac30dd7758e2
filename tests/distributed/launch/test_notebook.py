"""Runs in a notebook: its process forks the ranks, and gets their weights, metrics and errors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch.notebook_script import CELLS
from tests.scripts import run_warm, script_environment

SCRIPT = Path(__file__).with_name("notebook_script.py")
SECONDS = 60


def test_cells_in_one_process(tmp_path: Path) -> None:
    code, output = run_warm(str(SCRIPT), processes=1, cwd=tmp_path, timeout_seconds=SECONDS)
    assert code == 0, output
    assert "frame #" not in output


@pytest.mark.slow
def test_in_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    from nbformat.v4 import new_code_cell, new_notebook

    _use_environment(monkeypatch)
    bar = (
        "class Printing(Model):\n    def on_train_start(self):\n        if self.trainer.global_rank == 1:\n"
        "            print('of rank', 1)\n"
        "trainer('tp2', enable_progress_bar=True).fit(Printing(), data)"
    )
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in (*CELLS, bar)])
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "of rank 1" in text


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A kernel and its client, after the first cell."""
    manager = pytest.importorskip("jupyter_client.manager")
    _use_environment(monkeypatch)
    kernel, client = manager.start_new_kernel(cwd=str(tmp_path))
    assert client.execute(CELLS[0], reply=True, timeout=SECONDS)["content"]["status"] == "ok"
    yield kernel, client
    client.stop_channels()
    kernel.shutdown_kernel(now=True)


def _use_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - script_environment().keys():
        monkeypatch.delenv(name)
    for name, value in script_environment().items():
        monkeypatch.setenv(name, value)


LONG = """
class Long(Model):
    def training_step(self, batch, index):
        open(f"pid{self.global_rank}", "w").write(str(os.getpid()))
        return super().training_step(batch, index)

trainer("dp2", max_epochs=-1).fit(Long(), data)
"""


def _ranks(folder: Path) -> list[int]:
    """Waits until both ranks train; their process ids."""
    files = [folder / "pid0", folder / "pid1"]
    deadline = time.monotonic() + SECONDS
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [int(file.read_text()) for file in files]


def _all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("only_kernel", [False, True])
def test_interrupt_ends_the_ranks(kernel: tuple[Any, Any], tmp_path: Path, only_kernel: bool) -> None:
    manager, client = kernel
    cell = client.execute(LONG)
    pids = _ranks(tmp_path)
    if only_kernel:
        os.kill(manager.provisioner.pid, signal.SIGINT)
    else:
        manager.interrupt_kernel()
    while (reply := client.get_shell_msg(timeout=SECONDS))["parent_header"]["msg_id"] != cell:
        pass
    assert reply["content"]["ename"] in ("SystemExit", "KeyboardInterrupt")
    assert _all_end(pids)
    reply = client.execute("trainer('fsdp2').fit(Model(), data)", reply=True, timeout=SECONDS)
    assert reply["content"]["status"] == "ok", reply


@pytest.mark.slow
def test_ranks_end_with_the_kernel(kernel: tuple[Any, Any], tmp_path: Path) -> None:
    manager, client = kernel
    client.execute(LONG)
    pids = _ranks(tmp_path)
    os.kill(manager.provisioner.pid, signal.SIGKILL)
    assert _all_end(pids)
