"""Every block of Python in the documentation runs: in one process, for two steps, on a small model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_hybrid
import lightning_hybrid.callbacks as callbacks
from lightning_hybrid import CheckpointOptions, Float8Precision, HybridStrategy, Layout
from tests.documents import PAGES, ROOT, blocks, write_files

TOKENS, WIDTH, SAMPLES = 16, 8, 16


class Model(L.LightningModule):
    """A language model of a few weights: two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch["x"]).flatten(0, 1), batch["y"].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def _dataset() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(TOKENS, (SAMPLES, 5), generator=generator)
    return [{"x": row[:-1], "y": row[1:]} for row in text]


def _loader() -> DataLoader:
    return DataLoader(_dataset(), batch_size=4)  # type: ignore[arg-type] -- a list is a dataset


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return _loader()


def _names() -> dict[str, Any]:
    """The names that blocks use without an import, since the text around them has introduced them."""
    public = {name: getattr(callbacks, name) for name in callbacks.__all__}
    model = Model()
    trainer = SimpleNamespace(strategy=mock.create_autospec(HybridStrategy, instance=True))
    return public | {
        "CheckpointOptions": CheckpointOptions,
        "DataLoader": DataLoader,
        "F": F,
        "Float8Precision": Float8Precision,
        "HybridStrategy": HybridStrategy,
        "L": L,
        "ModelCheckpoint": ModelCheckpoint,
        "WandbLogger": WandbLogger,
        "data": Data(),
        "dataset": _dataset(),
        "lengths": [4] * SAMPLES,
        "loader": _loader(),
        "model": model,
        "module": model,
        "pad": torch.utils.data.default_collate,
        "timedelta": timedelta,
        "torch": torch,
        "trainer": trainer,
    }


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


def _train(names: dict[str, Any]) -> None:
    """Trains the modules of a block, and one with its functions whose first argument is `self`."""
    functions = {name: value for name, value in names.items() if isinstance(value, FunctionType)}
    methods = {name: value for name, value in functions.items() if [*signature(value).parameters][:1] == ["self"]}
    kinds = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, L.LightningModule)]
    for kind in [*kinds, *([type("Module", (Model,), methods)] if methods else [])]:
        L.Trainer(strategy=HybridStrategy()).fit(kind(), Data())


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
            names = {"__name__": "__main__"} | ({} if block.title else _names())
            with _one_process(tmp_path), mock.patch.dict(os.environ):
                exec(code, names)
                if not block.title:
                    _train(names)
