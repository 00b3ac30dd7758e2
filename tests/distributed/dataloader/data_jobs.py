"""Modules, datasets and calls for the tests of data under every layout; the calls run on every rank of a group."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tests.distributed.jobs import WIDTH, Classifier, Manual, Numbers, quiet, trainer_for, weights


class Recording(Classifier):
    """Notes what it sees and logs every kind of reduction."""

    def __init__(self, norm: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.norm: Any = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.collected, self.val_accuracy = torchmetrics.CatMetric(), torchmetrics.MeanMetric()
        self.steps: list[list[int]] = []
        self.noise: list[list[float]] = []

    def forward(self, x):
        return super().forward(self.norm(x))

    def training_step(self, batch, batch_idx):
        self.steps.append(batch["index"].tolist())
        if "noise" in batch:
            self.noise.append(batch["noise"].flatten().tolist())
        self.collected.update(batch["index"].float())
        self.log("largest", batch["index"].max().float(), reduce_fx="max", on_step=False, on_epoch=True)
        self.log("smallest", batch["index"].min().float(), reduce_fx="min", on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("in_hook", batch["index"].float().mean(), on_step=False, on_epoch=True)

    def on_train_epoch_end(self):
        self.log("collected", torch.as_tensor(self.collected.compute()).sum())  # nothing behind a resumption
        self.collected.reset()

    def validation_step(self, batch, batch_idx):
        logits = self(batch["x"])
        self.log("val", nn.functional.cross_entropy(logits, batch["y"]))
        self.val_accuracy((logits.argmax(1) == batch["y"]).float())
        self.log("val_accuracy", self.val_accuracy, on_epoch=True)


class WithNoise(Dataset):
    """Samples with what the generators of Python, NumPy and torch give while each is read."""

    def __init__(self, count: int) -> None:
        self.numbers = Numbers(count)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])
        for _ in range(index % 3):  # samples draw differently often
            noise = noise + 0.0 * (torch.rand(()) + float(np.random.rand()) + random.random())
        sample = self.numbers[index]
        return {**sample, "x": sample["x"] + noise[2] - 0.5, "noise": noise}


class Halving(Sampler):
    """A sampler with an epoch and a state of its own."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch, self.passes = count, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1000 * self.epoch + self.passes)
        self.passes += 1
        return iter(torch.randperm(self.count, generator=generator).tolist())


class Joined:
    """A batch sampler with the batches of another, `count` at a time: what one process sees of it."""

    def __init__(self, batches: Any, count: int) -> None:
        self.batches, self.count = batches, count

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batches)
        for i in range(0, len(batches), self.count):
            yield [k for batch in batches[i : i + self.count] for k in batch]

    def __len__(self) -> int:
        return -(-len(self.batches) // self.count)


class Growing:
    """A batch sampler of its own kind, with batches of different sizes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def _sizes(self) -> list[int]:
        sizes = []
        while sum(sizes) < self.count:
            sizes.append(min(2 + len(sizes) % 4, self.count - sum(sizes)))
        return sizes

    def __iter__(self) -> Iterator[list[int]]:
        keys = torch.randperm(self.count).tolist()
        for size in self._sizes():
            yield [keys.pop() for _ in range(size)]

    def __len__(self) -> int:
        return len(self._sizes())


GLOBAL_BATCH = 16


def in_workers(count: int) -> dict[str, Any]:
    """Options of a loader with so many workers, forked: the ranks of a test start others slowly."""
    return {"num_workers": count, "multiprocessing_context": "fork"} if count else {}


RUNNING: list[L.Trainer] = []
"""The trainer that runs, for datasets that ask it."""


def loader_for(kind: str, samples: int, replicas: int, **options: Any) -> DataLoader:  # noqa: C901 -- a table
    """A training loader of a replica, so that the global batch is always the same."""
    data: Dataset = Numbers(samples)
    size = GLOBAL_BATCH // replicas
    options = {**in_workers(options.pop("num_workers", 0)), **options}
    if kind == "in order":
        return DataLoader(data, size, **options)
    if kind == "shuffled":
        return DataLoader(data, size, shuffle=True, **options)
    if kind == "own generator":
        return DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(3), **options)
    if kind == "weighted":
        chances = torch.linspace(0.1, 1.0, samples).tolist()
        return DataLoader(data, size, sampler=WeightedRandomSampler(chances, samples), **options)
    if kind == "subset":
        return DataLoader(data, size, sampler=SubsetRandomSampler(range(0, samples, 2)), **options)
    if kind == "own sampler":
        return DataLoader(data, size, sampler=Halving(samples), **options)
    if kind == "given batches":
        batches = BatchSampler(RandomSampler(range(samples)), size, drop_last=False)
        return DataLoader(data, batch_sampler=batches, **options)
    if kind == "own batches":
        batches: Any = Growing(samples)
        return DataLoader(data, batch_sampler=batches, **options)
    if kind == "joined batches":  # what `own batches` are with two replicas, for one process
        batches = Joined(Growing(samples), 2)
        return DataLoader(data, batch_sampler=batches, **options)
    if kind == "noise":
        return DataLoader(WithNoise(samples), size, shuffle=True, **options)
    if kind == "noise in a subset":
        return DataLoader(Subset(WithNoise(samples), range(samples)), size, shuffle=True, **options)
    raise ValueError(kind)


def train(
    layout: str | None,
    *,
    kind: str = "shuffled",
    samples: int = 37,
    manual: bool = False,
    module_options: dict | None = None,
    loader_options: dict | None = None,
    val_samples: int = 21,
    save: tuple[str, str, int] | None = None,
    ckpt_path: str | None = None,
    global_batch_factor: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Trains; returns weights, metrics, and the samples that this rank has seen, step by step.

    Args:
        layout: The layout; None: one process without the strategy.
        kind: See `loader_for`.
        samples: Size of the dataset.
        manual: Whether to optimize manually.
        module_options: Of the module.
        loader_options: Of the loader.
        val_samples: Size of the validation dataset; 0: no validation.
        save: Path, hook (`batch`, `epoch`, `validation`, `epoch start`) and global step of a checkpoint.
        ckpt_path: Checkpoint to go on with.
        global_batch_factor: The global batch is this many times smaller.
        options: Of the trainer.
    """
    quiet()
    L.seed_everything(7, verbose=False)
    module: Any = Manual() if manual else Recording(**(module_options or {}))
    callbacks: list[L.Callback] = [SaveAt(*save)] if save else []
    trainer, replicas = trainer_for(layout, callbacks=callbacks, **{"max_epochs": 2, **options})
    loader = loader_for(kind, samples, replicas * global_batch_factor, **(loader_options or {}))
    val = DataLoader(Numbers(val_samples), 8 // replicas) if val_samples else None
    trainer.fit(module, loader, val, ckpt_path=ckpt_path, weights_only=False)
    return {
        "weights": weights(trainer, module),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "steps": getattr(module, "steps", []),
        "noise": getattr(module, "noise", []),
        "buffers": {n: b.clone() for n, b in module.named_buffers() if "norm" in n},
        "any_uneven": getattr(getattr(trainer.strategy, "data", None), "_any_uneven", False),
    }


class SaveAt(L.Callback):
    """Saves a checkpoint once, in a hook after a global step."""

    def __init__(self, path: str, hook: str, step: int) -> None:
        self.path, self.hook, self.step, self.done = path, hook, step, False

    def _save(self, trainer: L.Trainer, hook: str) -> None:
        if hook == self.hook and trainer.global_step == self.step and not self.done:
            self.done = True
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        self._save(trainer, "batch")

    def on_train_epoch_end(self, trainer, *_: Any) -> None:
        self._save(trainer, "epoch")

    def on_validation_end(self, trainer, *_: Any) -> None:
        self._save(trainer, "validation")


def file_of(folder: Any, name: str) -> str:
    """A path as text, for the ranks."""
    return str(Path(folder) / name)
