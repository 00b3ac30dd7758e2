"""Runs that are saved and resumed, for the tests of checkpoints; they run on every rank of a group."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from tests.distributed.jobs import WIDTH, Block, Numbers, quiet, trainer_for, weights

SAMPLES, GLOBAL_BATCH = 40, 8
STEPS_PER_EPOCH = SAMPLES // GLOBAL_BATCH


class Net(L.LightningModule):
    """A stack of blocks with dropout, buffers, a weight with two names, and a learning rate that changes each step."""

    def __init__(self, dropout: float = 0.2, extra: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(Block(WIDTH), nn.Dropout(dropout)) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4, bias=False)
        self.second_head = nn.Linear(WIDTH, 4, bias=False)
        self.second_head.weight = self.head.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x) + self.second_head(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("loss", loss)
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        self.seen += 1

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch["x"]), batch["y"]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-4)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Hooks(Net):
    """Leaves the stem out of its checkpoints, and puts something of its own in."""

    def on_save_checkpoint(self, checkpoint):
        for name in [n for n in checkpoint["state_dict"] if n.startswith("stem.")]:
            del checkpoint["state_dict"][name]
        checkpoint["mine"] = {"tensor": torch.arange(3), "text": "kept"}

    def on_load_checkpoint(self, checkpoint):
        self.found = checkpoint["mine"]
        assert not any(n.startswith("stem.") for n in checkpoint["state_dict"])
        for name, value in self.state_dict().items():
            if name.startswith("stem."):
                checkpoint["state_dict"][name] = torch.full(value.shape, 0.5)
        # hooks see whole tensors and may compute with them
        checkpoint["state_dict"]["norm.bias"] = checkpoint["state_dict"]["norm.bias"] * 0 + 0.25


class Losses(Callback):
    """Every step's loss, and the samples that this rank has seen in it."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.samples: dict[int, list[int]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = float(trainer.callback_metrics["loss"])
        self.samples[trainer.global_step] = batch["index"].tolist()


def run(
    layout: str | None,
    folder: str | None = None,
    *,
    ckpt_path: str | None = None,
    dropout: float = 0.2,
    every: int = 1,
    keep: int = -1,
    save_last: bool = False,
    shuffle: bool = True,
    workers: int = 0,
    kind: str = "Net",
    max_epochs: int = 2,
    checkpoints: dict[str, Any] | None = None,
    callbacks: list[Callback] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains with a checkpoint every `every` steps, or goes on from one."""
    from lightning_hybrid import CheckpointOptions
    from lightning_hybrid.checkpoint.checkpoints import Checkpoints

    quiet()
    L.seed_everything(3, verbose=False)
    module = {"Net": Net, "Hooks": Hooks}[kind](dropout)
    losses = Losses()
    callbacks = [losses, *(callbacks or [])]
    if folder is not None:
        callbacks.append(
            ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=keep, save_last=save_last)
        )
    trainer, replicas = trainer_for(
        layout,
        max_epochs=max_epochs,
        callbacks=callbacks,
        enable_checkpointing=folder is not None,
        **options,
    )
    strategy: Any = trainer.strategy
    if checkpoints is not None:
        strategy.checkpoints = Checkpoints(CheckpointOptions(**checkpoints), timedelta(seconds=60))
    loader = DataLoader(Numbers(SAMPLES), batch_size=GLOBAL_BATCH // replicas, shuffle=shuffle, num_workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, DataLoader(Numbers(8), batch_size=8 // replicas), ckpt_path=ckpt_path)
    return {
        "losses": losses.losses,
        "samples": losses.samples,
        "weights": weights(trainer, module),
        "seen": int(module.seen),
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        "found": getattr(module, "found", None),
        "random": float(torch.rand(())),
        "warnings": "\n".join(str(w.message) for w in caught),
    }


def files(folder: str | Path) -> list[str]:
    """Names in a folder."""
    return sorted(p.name for p in Path(folder).iterdir())
