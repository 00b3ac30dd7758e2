"""Every block of Python in the documentation runs: in one process, for two steps, on a small model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as L
import pytest
import torch.distributed as dist
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_hybrid
from lightning_hybrid import HybridStrategy, Layout
from tests.document_names import Data, modules_of, names
from tests.documents import PAGES, ROOT, blocks, write_files


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Inside, each Trainer has one process on the CPU and two steps; layouts must fit their devices."""
    start = L.Trainer.__init__

    def small(trainer: L.Trainer, **options: Any) -> None:
        strategy, devices = options.pop("strategy", "auto"), options.pop("devices", 1)
        devices *= options.pop("num_nodes", 1)
        if isinstance(strategy, str) and strategy.startswith("hybrid"):
            strategy = HybridStrategy(strategy.removeprefix("hybrid").removeprefix("-") or None)
        if isinstance(strategy, HybridStrategy) and strategy._request.plan is None:
            (strategy._layout or Layout(fsdp=devices)).validate(devices)
            strategy._layout = None
        small_ones: dict[str, Any] = {"max_steps": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
        quiet: dict[str, Any] = {"enable_model_summary": False, "log_every_n_steps": 1, "default_root_dir": folder}
        saves = any(isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", ()))
        given: dict[str, Any] = {"logger": False, "enable_checkpointing": saves} | options
        start(trainer, **given | small_ones | quiet, strategy=strategy)

    with mock.patch.object(L.Trainer, "__init__", small):
        yield
    if dist.is_initialized():
        dist.destroy_process_group()
    wandb.finish()


def _pages() -> list[Path]:
    return [page for page in PAGES if any(block.kind == "python" for block in blocks(page))]


@pytest.mark.filterwarnings("ignore:.* there is no last checkpoint available")
@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_python_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setattr(lightning_hybrid, "verify", mock.create_autospec(lightning_hybrid.verify))
    write_files(page, tmp_path)
    for block in blocks(page):
        if block.kind != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if not block.not_run:
            executed = {"__name__": "__main__"} | ({} if block.title else names())
            with _one_process(tmp_path), mock.patch.dict(os.environ):
                exec(code, executed)
                for kind in [] if block.title else modules_of(executed):
                    L.Trainer(strategy=HybridStrategy()).fit(kind(), Data())
