"""A user's script and module for `test_session.py`: everything that a session does, or how a run ends early."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid import HybridStrategy


class Net(L.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = (8, width, width, 2)
        layers = [layer for i in range(3) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.layers(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class OneLayer(Net):
    """No place to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(8, 2)


class Fails(Net):
    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == 1:
            raise KeyError("of the user")
        return super().training_step(batch, index)


class FailsOnOneRank(Net):
    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 1 and self.trainer.global_rank == 1:
            raise KeyError("of the user")


class Slow(Net):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.2)


class Points(L.LightningDataModule):
    def loader(self) -> DataLoader:
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=8)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def trainer(layout: str, epochs: int, **options: Any) -> L.Trainer:
    options = {"accelerator": "cpu", "devices": 2, "log_every_n_steps": 2, **options}
    return L.Trainer(strategy=HybridStrategy(layout), max_epochs=epochs, **options)


def session(layout: str) -> None:
    L.seed_everything(0)
    model, data = Net(), Points()
    stopping, bar = EarlyStopping("val_loss", verbose=True), TQDMProgressBar()
    first = trainer(layout, 2, callbacks=[stopping])
    first.fit(model, data)
    first.validate(model, data)
    first.test(model, data)
    first.predict(model, data)
    first.save_checkpoint("saved.ckpt")
    trainer(layout, 3, callbacks=[stopping, bar]).fit(Net(), data, ckpt_path="saved.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, strategy = sys.argv[1:]
    if name == "session":
        session(strategy)
    else:
        trainer(strategy, 1).fit(globals()[name](), Points())
