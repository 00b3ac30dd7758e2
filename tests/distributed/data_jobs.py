"""Modules, datasets and calls for the tests of data under every layout; the calls run on every rank of a group."""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from tests.distributed.jobs import WIDTH, Block, Classifier, Manual, Numbers, quiet, trainer_for, weights


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
    """Samples with what the streams of Python, NumPy and torch give while each is read."""

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


# ---- predictions


class Writer(BasePredictionWriter):
    """Keeps what a prediction writer is given."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[tuple[int, list[int], list[int]]] = []
        self.epoch: Any = None

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.batches.append((dataloader_idx, list(batch_indices or []), prediction["index"].tolist()))

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.epoch = ([len(p) if isinstance(p, list) else 1 for p in predictions], batch_indices)


class Predicting(Classifier):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {
            "index": batch["index"],
            "logits": self(batch["x"]),
            "batch": batch_idx,
            "loader": dataloader_idx,
        }


def predict(layout: str | None, counts: tuple[int, ...] = (21,), size: int | None = 4, **options: Any) -> Any:
    """Predictions on loaders with so many samples, and what a writer saw."""
    quiet()
    L.seed_everything(7, verbose=False)
    returned = options.pop("return_predictions", None)
    writer = Writer()
    trainer, _ = trainer_for(layout, callbacks=[writer] if size else [], **options)
    loaders = [DataLoader(Numbers(count), batch_size=size) for count in counts]
    data: Any = loaders if len(loaders) > 1 else loaders[0]
    found = trainer.predict(Predicting(), data, return_predictions=returned)
    return found, writer.batches, writer.epoch


# ---- streams


class Stream(IterableDataset):
    """Samples in order; `shard` says which ones this process reads."""

    def __init__(self, count: int, shard: Callable[[], tuple[int, int]] | None = None, noisy: bool = False) -> None:
        self.numbers, self.shard, self.noisy = Numbers(count), shard, noisy

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index, count = self.shard() if self.shard is not None else (0, 1)
        info = get_worker_info()
        if info is not None:
            index, count = index + count * info.id, count * info.num_workers
        for i in range(index, len(self.numbers), count):
            sample = self.numbers[i]
            if self.noisy:
                sample["noise"] = torch.rand(1)
            yield sample


class Resuming(Stream):
    """A stream that can go on where it was."""

    def __init__(self, count: int) -> None:
        super().__init__(count, noisy=True)
        self.at = 0
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.at < len(self.numbers):
            self.at += 1
            self.read += 1
            yield {**self.numbers[self.at - 1], "noise": torch.rand(1)}
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Once(IterableDataset):
    """A stream that cannot be read again."""

    def __init__(self, count: int) -> None:
        self.samples = iter([Numbers(count)[i] for i in range(count)])

    def __iter__(self) -> Once:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self.samples)


class Batches:
    """A loader that is no DataLoader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def predict_on_stream(
    layout: str | None, count: int, sized: bool = False, loaders: int = 1, limit: int | None = None
) -> Any:
    """Predictions on a stream of so many samples, or on a list of the same batches."""
    quiet()
    L.seed_everything(7, verbose=False)
    trainer, _ = trainer_for(layout, limit_predict_batches=limit)
    data: Any = DataLoader(Stream(count), batch_size=4)
    data = Batches(list(data)) if sized else data
    return trainer.predict(Predicting(), [data] * loaders if loaders > 1 else data)


class ByReplica:
    """As a user shards: by the strategy's own numbers, which travel to workers."""

    def __init__(self, known: tuple[int, int] | None = None) -> None:
        self.known = known

    def __call__(self) -> tuple[int, int]:
        if self.known is not None:
            return self.known
        numbers = RUNNING[-1].distributed_sampler_kwargs
        assert numbers is not None
        return numbers["rank"], numbers["num_replicas"]

    def __reduce__(self) -> tuple[Any, ...]:
        return ByReplica, (self(),)


by_replica = ByReplica()


def by_rank() -> tuple[int, int]:
    """The wrong way under `tp` and `pp`."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Shards(Stream):
    """Shards of different lengths: the first two thirds, the rest."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = 2 * len(self.numbers) // 3
        for i in range(first) if by_replica()[0] == 0 else range(first, len(self.numbers)):
            yield self.numbers[i]


def train_left_alone(layout: str, kind: str) -> list[list[int]]:
    """Trains on a loader that the strategy must not touch; returns the samples that this rank saw."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Recording()
    own = kind == "distributed sampler"
    trainer, _ = trainer_for(layout, use_distributed_sampler=own)
    sampler = DistributedSampler(Numbers(32), *reversed(by_rank_of_this_process()), shuffle=False) if own else None
    trainer.fit(module, DataLoader(Numbers(32), 8, sampler=sampler))
    return module.steps


def by_rank_of_this_process() -> tuple[int, int]:
    """Rank and world size, before the processes are connected."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def train_on_stream(
    layout: str | None, kind: str = "plain", samples: int = 37, workers: int = 0, **options: Any
) -> Any:
    """Trains on a stream; see `train`."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Recording()
    save = options.pop("save", None)
    ckpt_path = options.pop("ckpt_path", None)
    callbacks: list[L.Callback] = [SaveAt(*save)] if save else []
    trainer, replicas = trainer_for(layout, callbacks=callbacks, **{"max_epochs": 2, **options})
    RUNNING[:] = [trainer]
    size = GLOBAL_BATCH // replicas
    datasets: dict[str, Callable[[], IterableDataset]] = {
        "plain": lambda: Stream(samples),
        "noisy": lambda: Stream(samples, noisy=True),
        "by replica": lambda: Stream(samples, by_replica if layout else None),
        "by rank": lambda: Stream(samples, by_rank if layout else None),
        "uneven shards": lambda: Shards(samples),
        "resuming": lambda: Resuming(samples),
        "once": lambda: Once(samples),
    }
    if kind == "list":
        numbers = Numbers(samples)
        parts = [range(i, min(samples, i + size)) for i in range(0, samples, size)]
        loader: Any = Batches([next(iter(DataLoader(numbers, len(p), sampler=list(p)))) for p in parts])
    else:
        drop = kind == "drop last"
        dataset = Stream(samples) if drop else datasets[kind]()
        loader = DataLoader(dataset, size, drop_last=drop, **in_workers(workers))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=False)
    return {
        "weights": weights(trainer, module),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "steps": module.steps,
        "noise": module.noise,
        "warned": [str(warning.message) for warning in caught],
        "read": getattr(getattr(loader, "dataset", None), "read", 0),
    }


def file_of(folder: Any, name: str) -> str:
    """A path as text, for the ranks."""
    return str(Path(folder) / name)


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
