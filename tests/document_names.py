"""What the blocks of Python in the documentation use without an import: a small language model and its data."""

from __future__ import annotations

from datetime import timedelta
from inspect import signature
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_hybrid.callbacks as callbacks
from lightning_hybrid import CheckpointOptions, Float8Precision, HybridStrategy

TOKENS, WIDTH, SAMPLES = 16, 8, 16


class Model(L.LightningModule):
    """Two blocks between an embedding and a head."""

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

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch["x"]).flatten(0, 1), batch["y"].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def dataset() -> list[dict[str, torch.Tensor]]:
    """Random tokens, and for each the one that follows."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(TOKENS, (SAMPLES, 5), generator=generator)
    return [{"x": row[:-1], "y": row[1:]} for row in text]


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(dataset(), batch_size=self.batch_size)  # type: ignore[arg-type] -- a list is a dataset


def names() -> dict[str, Any]:
    """The names that blocks use without an import, since the text around them has introduced them."""
    public = {name: getattr(callbacks, name) for name in callbacks.__all__}
    model = Model()
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
        "dataset": dataset(),
        "lengths": [4] * SAMPLES,
        "loader": Data().train_dataloader(),
        "model": model,
        "module": model,
        "pad": torch.utils.data.default_collate,
        "timedelta": timedelta,
        "torch": torch,
        "trainer": SimpleNamespace(strategy=mock.create_autospec(HybridStrategy, instance=True)),
    }


def modules_of(executed: dict[str, Any]) -> list[type[L.LightningModule]]:
    """Returns the modules that a block has made, and one with its functions whose first argument is `self`."""
    functions = {name: value for name, value in executed.items() if isinstance(value, FunctionType)}
    methods = {name: value for name, value in functions.items() if [*signature(value).parameters][:1] == ["self"]}
    kinds = [kind for kind in executed.values() if isinstance(kind, type) and issubclass(kind, L.LightningModule)]
    return [*kinds, *([type("Module", (Model,), methods)] if methods else [])]
