"""Calls for the tests of loaders beyond one plain DataLoader; they run on every rank of a group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler

from tests.distributed.dataloader.data_jobs import (
    GLOBAL_BATCH,
    Joined,
    Recording,
    SaveAt,
    train,
)
from tests.distributed.dataloader.stream_jobs import Batches, Stream
from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights


def _result(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    return {
        "weights": weights(trainer, module),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "steps": getattr(module, "steps", []),
    }


# ---- nothing to read


def train_on_nothing(layout: str | None, kind: str) -> dict[str, Any]:
    """Trains on data without a batch."""
    if kind == "dropped":
        return train(layout, samples=3, kind="in order", val_samples=0, loader_options={"drop_last": True})
    if kind == "samples":
        return train(layout, samples=0, kind="in order", val_samples=0)
    quiet()
    L.seed_everything(7, verbose=False)
    module = Recording()
    trainer, _ = trainer_for(layout)
    trainer.fit(module, DataLoader(Stream(0), 4) if kind == "stream" else Batches([]))
    return _result(trainer, module)


def train_without_validation_data(layout: str | None) -> dict[str, Any]:
    """Trains with an empty dataset for validation."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Recording()
    trainer, replicas = trainer_for(layout)
    size = GLOBAL_BATCH // replicas
    trainer.fit(module, DataLoader(Numbers(37), size), DataLoader(Numbers(0), size))
    return _result(trainer, module)


def validate_beside_nothing(layout: str | None, named: bool) -> dict[str, Any]:
    """Validates on an empty dataset and on another."""
    quiet()
    L.seed_everything(7, verbose=False)
    trainer, replicas = trainer_for(layout)
    loaders: Any = [DataLoader(Numbers(count), 8 // replicas) for count in (0, 21)]
    trainer.validate(SeveralSets(), dict(zip("ab", loaders, strict=True)) if named else loaders, verbose=False)
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


class SeveralSets(Classifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


# ---- several loaders


class Together(Classifier):
    """Trains on the samples of all loaders of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if "x" not in batch else [batch]
        joined = {k: torch.cat([part[k] for part in parts]) for k in ("x", "y", "index")}
        self.steps.append(joined["index"].tolist())
        logits = self(joined["x"])
        loss = nn.functional.cross_entropy(logits, joined["y"])
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(joined["y"]))
        return loss


def train_on_several(
    layout: str | None,
    mode: str | None,
    counts: tuple[int, int],
    *,
    shuffle: bool = False,
    own_batches: bool = False,
    fits: int = 1,
    save: Any = None,
    ckpt_path: str | None = None,
) -> dict[str, Any]:
    """Trains on two loaders, `mode` is that of a `CombinedLoader`, without one they are in a dictionary."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Together()
    trainer, replicas = trainer_for(layout, max_epochs=2, callbacks=[SaveAt(*save)] if save else [])
    loaders: Any = {
        k: DataLoader(Numbers(n), 8 // replicas, shuffle=shuffle) for k, n in zip("ab", counts, strict=True)
    }
    if own_batches:
        sampler: Any = Joined(BatchSampler(range(counts[1]), 4, drop_last=False), 1)
        loaders["b"] = DataLoader(Numbers(counts[1]), batch_sampler=sampler)
    data: Any = CombinedLoader(loaders, mode) if mode else loaders  # type: ignore[arg-type]  -- any text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(fits):
            trainer.fit_loop.max_epochs = 2 * (number + 1)
            trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return {**_result(trainer, module), "warned": [str(warning.message) for warning in caught]}


def read_again(layout: str | None) -> tuple[dict[str, float], list[int]]:
    """What is logged, and the numbers of batches, with loaders that Lightning has handed out before."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, (trainer, replicas) = SeveralSets(), trainer_for(layout)
    size = 8 // replicas
    trainer.validate(module, [DataLoader(Numbers(21), size), DataLoader(Numbers(37), size)], verbose=False)
    again: Any = trainer.val_dataloaders
    trainer.validate(module, again, verbose=False)
    stream: Any = CombinedLoader(DataLoader(Stream(37), size), "max_size_cycle")
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, stream)
    counts = [int(n) for n in trainer.validate_loop.max_batches]
    return {k: float(v) for k, v in trainer.callback_metrics.items()}, [*counts, trainer.global_step]


# ---- steps that take an iterator


class Iterating(Classifier):
    """Takes the iterator instead of a batch."""

    def training_step(self, dataloader_iter):  # type: ignore[override]  -- the form that Lightning looks for
        batch, _, _ = next(dataloader_iter)
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"])


def train_by_iterator(layout: str | None, samples: int) -> dict[str, Any]:
    """Trains with a step that takes an iterator."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Iterating()
    trainer, replicas = trainer_for(layout)
    trainer.fit(module, DataLoader(Numbers(samples), GLOBAL_BATCH // replicas))
    return _result(trainer, module)


# ---- data without a length, or with batches of any size


class Endless(Sampler):
    """Samples without an end, drawn from the default generator or from a generator of its own."""

    def __init__(self, count: int, own: bool) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(3) if own else None

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count, generator=self.generator).tolist()


def train_without_end(layout: str | None, own: bool, save: Any = None, ckpt_path: str | None = None) -> dict[str, Any]:
    """Trains on a sampler without a length, five steps an epoch."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Recording()
    callbacks: list[L.Callback] = [SaveAt(*save)] if save else []
    trainer, replicas = trainer_for(layout, max_epochs=2, limit_train_batches=5, callbacks=callbacks)
    loader = DataLoader(Numbers(37), GLOBAL_BATCH // replicas, sampler=Endless(37, own))
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=False)
    return _result(trainer, module)


def train_on_batches_of_any_size(layout: str | None, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Trains on a list of batches of so many samples; one process takes as many at once as two replicas do."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Recording()
    trainer, replicas = trainer_for(layout, max_epochs=2)
    numbers, parts, start = Numbers(sum(sizes)), [], 0
    for size in sizes:
        parts.append(list(range(start, start + size)))
        start += size
    if replicas == 1:
        parts = [[i for part in parts[n : n + 2] for i in part] for n in range(0, len(parts), 2)]
    trainer.fit(module, Batches([next(iter(DataLoader(numbers, len(p), sampler=p))) for p in parts]))
    return _result(trainer, module)
