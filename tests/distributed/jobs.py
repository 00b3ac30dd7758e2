"""Modules and calls for the tests of this folder; the calls run on every rank of a group."""

from __future__ import annotations

import ctypes
import gc
import logging
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset

WIDTH = 16


class Numbers(Dataset):
    """Random rows and the class that a fixed random matrix gives them."""

    def __init__(self, count: int = 48) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, WIDTH, generator=generator)
        self.y = (self.x @ torch.randn(WIDTH, 4, generator=generator)).argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index], "index": index}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Classifier(L.LightningModule):
    """A stack of residual blocks, with what users do around it."""

    blocks: Any
    head: Any
    hparams: Any

    def __init__(self, lr: float = 0.1, optimizer: str = "sgd", width: int = WIDTH, lazy: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.blocks, self.head = None, None
        self.seen: list[float] = []
        if not lazy:
            self._build()
        self.accuracy = torchmetrics.MeanMetric()

    def _build(self) -> None:
        self.stem = nn.Linear(WIDTH, self.hparams.width)
        self.blocks = nn.ModuleList(Block(self.hparams.width) for _ in range(4))
        self.head = nn.Linear(self.hparams.width, 4)

    def configure_model(self):
        if self.blocks is None:
            self._build()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        logits = self(batch["x"])
        loss = nn.functional.cross_entropy(logits, batch["y"])
        hits = (logits.argmax(1) == batch["y"]).float()
        self.accuracy(hits)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("hits", hits.sum(), reduce_fx="sum", on_epoch=True, on_step=False)
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch["x"]), batch["y"]))

    def predict_step(self, batch, batch_idx):
        return {"index": batch["index"], "logits": self(batch["x"])}

    def configure_optimizers(self):
        if self.hparams.optimizer == "adamw":
            decay = [p for p in self.parameters() if p.ndim >= 2]
            rest = [p for p in self.parameters() if p.ndim < 2]
            groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
            # with the default eps a gradient of 1e-9, all rounding, moves a weight by as much as one of 1
            optimizer = torch.optim.AdamW(groups, lr=0.01, eps=1e-4)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]
        if self.hparams.optimizer == "head":
            for parameter in [*self.stem.parameters(), *self.blocks.parameters()]:
                parameter.requires_grad_(False)
            return torch.optim.SGD(self.head.parameters(), lr=self.hparams.lr)
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Manual(Classifier):
    """Two optimizers stepped by hand, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self):
        body = [*self.stem.parameters(), *self.blocks.parameters()]
        return torch.optim.SGD(body, lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.05)


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def trainer_for(
    layout: str | None, *, strategy_options: dict[str, Any] | None = None, **options: Any
) -> tuple[L.Trainer, int]:
    """A Trainer under the layout (None: one process), and its number of replicas.

    Its steps are not compared with one process before the first update, since the tests compare the weights.
    """
    strategy: Any = "auto"
    devices = replicas = 1
    if layout is not None:
        from lightning_hybrid import HybridStrategy, Layout

        if layout == "none given":
            strategy, devices, replicas = HybridStrategy(), 2, 2
        else:
            parsed = Layout.parse(layout)
            strategy = HybridStrategy(layout=layout, **{"verify": "off", **(strategy_options or {})})
            devices, replicas = parsed.devices, parsed.replicas
    options = {"max_epochs": 1, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    return trainer, replicas


def verified_trainer_for(
    layout: str | None, *, strategy_options: dict[str, Any] | None = None, **options: Any
) -> tuple[L.Trainer, int]:
    """A Trainer as `trainer_for` makes it, that compares its first step with one process, as users' Trainers do."""
    return trainer_for(layout, strategy_options={"verify": "start", **(strategy_options or {})}, **options)


def weights(trainer: L.Trainer, module: L.LightningModule) -> dict[str, torch.Tensor]:
    """All weights, on rank 0."""
    strategy: Any = trainer.strategy
    state = strategy.full_state_dict() if hasattr(strategy, "full_state_dict") else module.state_dict()
    return {k: v.clone() for k, v in state.items()}


def fit(
    layout: str | None,
    kind: str = "Classifier",
    module_options: dict | None = None,
    *,
    shuffle: bool = False,
    batch: int = 16,
    samples: int = 48,
    ckpt_path: str | None = None,
    save: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains; returns weights and metrics."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = {"Classifier": Classifier, "Manual": Manual}[kind](**(module_options or {}))
    trainer, replicas = trainer_for(layout, **options)
    size = batch // replicas
    train = DataLoader(Numbers(samples), batch_size=size, shuffle=shuffle)
    trainer.fit(module, train, DataLoader(Numbers(16), batch_size=size), ckpt_path=ckpt_path, weights_only=False)
    if save is not None:
        trainer.save_checkpoint(save)
    return {"weights": weights(trainer, module), "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()}}


def predict(layout: str | None) -> Any:
    """Predictions of an untrained module."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Classifier()
    trainer, replicas = trainer_for(layout)
    return trainer.predict(module, DataLoader(Numbers(24), batch_size=8 // replicas))


def fit_twice(first: str, second: str) -> dict[str, Any]:
    """One module under two Trainers with two layouts, one after the other."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Classifier()
    for layout in (first, second):
        trainer, replicas = trainer_for(layout if layout != "one" else None)
        trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    return {"weights": weights(trainer, module)}


def fit_then_test(layout: str | None) -> dict[str, float]:
    """fit, validate and fit again with one Trainer."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Classifier()
    trainer, replicas = trainer_for(layout)
    train = DataLoader(Numbers(), batch_size=16 // replicas)
    trainer.fit(module, train)
    trainer.validate(module, DataLoader(Numbers(16), batch_size=16 // replicas), verbose=False)
    first = float(trainer.callback_metrics["val"])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, train)
    return {"val": first, "loss": float(trainer.callback_metrics["loss_epoch"])}


def peak_of_build(layout: str | None, width: int) -> tuple[float, float]:
    """Growth of the peak resident memory from before `configure_model` to after partitioning, and the model's size.

    Both in MiB. The first step, which needs gradients and activations, is not part of it.
    """
    quiet()
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 18)  # so that freed tensors go back to the system at once
    fit(layout, max_steps=1)  # what is imported and allocated once
    L.seed_everything(7, verbose=False)
    module = Classifier(lazy=True, width=width)
    peak = _PeakAtStart()
    trainer, replicas = trainer_for(layout, max_steps=1, callbacks=[peak])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    trainer.fit(module, DataLoader(Numbers(16), batch_size=16 // replicas))
    size = sum(4 * 2 * 2 * width * width for _ in range(4))
    return (peak.value - before) / 1024, size / 2**20


class _PeakAtStart(L.Callback):
    value = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.value = _status("VmHWM")


_M_MMAP_THRESHOLD = -3
"""Parameter of glibc's mallopt: from this size on, an allocation is a mapping of its own."""


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0
