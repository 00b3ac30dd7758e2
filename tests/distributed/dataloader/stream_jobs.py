"""Predictions and streams under every layout; the calls run on every rank of a group."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    get_worker_info,
)

from tests.distributed.dataloader.data_jobs import GLOBAL_BATCH, RUNNING, Recording, SaveAt, in_workers
from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights

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
