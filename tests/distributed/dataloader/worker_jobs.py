"""Loaders with workers, and sequences, under every layout; the calls run on every rank of a group."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    default_collate,
    get_worker_info,
)

from tests.distributed.dataloader.data_jobs import RUNNING, Recording, SaveAt, WithNoise, in_workers
from tests.distributed.dataloader.stream_jobs import Stream, by_replica
from tests.distributed.jobs import WIDTH, Block, Numbers, quiet, trainer_for, weights

# ---- loaders and workers


class OwnLoader:
    """A loader that keeps its own place."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at = batches, 0
        self.loaded: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loaded, self.at = state, state["at"]


def train_on_own_loader(layout: str, save: Any = None, ckpt_path: str | None = None) -> Any:
    """Trains on four batches, of which two go into a step; returns the steps and the state that was loaded."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Recording()
    trainer, _ = trainer_for(layout, callbacks=[SaveAt(*save)] if save else [])
    loader = OwnLoader(list(DataLoader(Numbers(32), 8)))
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=False)
    return module.steps, loader.loaded


class NoteDataset:
    """A `worker_init_fn` that writes down the type of the worker's dataset."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, worker: int) -> None:
        info: Any = get_worker_info()
        (Path(self.folder) / f"{worker}").write_text(type(info.dataset).__name__)


def what_workers_see(layout: str, kind: str) -> list[str]:
    """The types of dataset that a `worker_init_fn` sees in two workers."""
    quiet()
    L.seed_everything(7, verbose=False)
    dataset: Any = WithNoise(32) if kind == "samples" else Stream(32)
    trainer, _ = trainer_for(layout)
    with tempfile.TemporaryDirectory() as folder:
        loader = DataLoader(dataset, 8, **in_workers(2), worker_init_fn=NoteDataset(folder))
        trainer.fit(Recording(), loader)
        return [(Path(folder) / str(i)).read_text() for i in range(2)]


class AtOnce(Numbers):
    """Reads a batch at once, with a random number for all of it."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        noise = torch.rand(1)
        return [{**self[i], "noise": noise + torch.rand(1)} for i in indices]


def collate_noisily(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Draws when it collates."""
    batch = default_collate(samples)
    return {**batch, "noise": batch["noise"] + float(np.random.rand()) + random.random()}


def collate_with_noise(layout: str, workers: int) -> list[list[float]]:
    """The random numbers of `__getitems__` and `collate_fn` in every step."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Recording()
    trainer, _ = trainer_for(layout)
    trainer.fit(module, DataLoader(AtOnce(32), 8, collate_fn=collate_noisily, **in_workers(workers)))
    return module.noise


def noise_of_stream(layout: str, context: str = "fork") -> list[list[float]]:
    """The random numbers of a stream that is sharded by replica, read in workers that are seeded by Lightning."""
    quiet()
    L.seed_everything(7, workers=True, verbose=False)
    module = Recording()
    trainer, _ = trainer_for(layout)
    RUNNING[:] = [trainer]
    trainer.fit(
        module, DataLoader(Stream(32, by_replica, noisy=True), 8, num_workers=1, multiprocessing_context=context)
    )
    os.environ.pop("PL_SEED_WORKERS")
    return module.noise


# ---- sequences


class Words(Dataset):
    """Sequences of changing length."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(3, 14, (count,), generator=generator)
        self.sequences = [torch.randint(1, 11, (int(n),), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.sequences[index]


def padded(sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch as long as its longest sequence."""
    return {
        "words": nn.utils.rnn.pad_sequence(sequences, batch_first=True),
        "lengths": torch.tensor([len(s) for s in sequences]),
    }


class Tagger(L.LightningModule):
    """Predicts the next word; padding is left out of every sample's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 12)

    def training_step(self, batch, batch_idx):
        words = batch["words"]
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        losses = nn.functional.cross_entropy(self.head(x)[:, :-1].transpose(1, 2), words[:, 1:], reduction="none")
        there = torch.arange(words.shape[1] - 1, device=words.device) < (batch["lengths"][:, None] - 1)
        loss = ((losses * there).sum(1) / there.sum(1)).mean()
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(words))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def train_on_sequences(layout: str | None, samples: int = 37) -> dict[str, Any]:
    """Trains on batches that are padded to their own longest sequence."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Tagger()
    trainer, replicas = trainer_for(layout)
    trainer.fit(module, DataLoader(Words(samples), 8 // replicas, shuffle=True, collate_fn=padded))
    return {"weights": weights(trainer, module), "loss": float(trainer.callback_metrics["loss"])}
