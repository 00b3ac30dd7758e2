"""Notebooks that cannot fork ranks are refused, before anything is forked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_hybrid.launch.notebook import NotebookLauncher
from lightning_hybrid.spec.errors import RankError


def _launcher(device: str) -> NotebookLauncher:
    strategy = SimpleNamespace(parallel_devices=[torch.device(device, 0), torch.device(device, 1)])
    return NotebookLauncher(strategy, ranks=None)  # type: ignore[arg-type] -- not reached


def test_cuda_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RankError, match="uses CUDA already .* Restart it \\(in a notebook, the kernel\\)"):
        _launcher("cuda").launch(print)


def test_process_of_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(RankError, match="one of 4 ranks already"):
        _launcher("cpu").launch(print)
