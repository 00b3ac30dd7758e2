"""`SampleData`: the data module that all data modules for supervised training build on."""

from __future__ import annotations

import random
import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hybrid.data.global_batches import EpochOrder, SplitBatches, replicas, share
from lightning_hybrid.data.samples import IGNORED, Padding, Sample, Samples, Task
from lightning_hybrid.data.token_batches import TokenBatchSampler
from lightning_hybrid.data.tokenizers import make_tokenizer

Item = TypeVar("Item")
Loader = DataLoader[Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How samples are tokenized, divided and batched.

    Raises:
        ValueError: If a value is out of range.
    """

    tokenizer: str | None = None
    """Name or local folder of a tokenizer of the transformers library; None: bytes, with a vocabulary of 272."""
    max_length: int = 256
    """Longest sample, in tokens. What is longer is left out; conversations end earlier."""
    batch_size: int = 16
    """Samples of a global batch; a multiple of the number of data-parallel replicas."""
    max_tokens: int | None = None
    """Tokens of a global batch, padding included, instead of a fixed number of samples: many short or few long ones."""
    multiple_of: int = 4
    """With `max_tokens`: divisor of the samples of a global batch; a multiple of replicas times microbatches."""
    validation_share: float = 0.1
    """Share of the items that is held out. An item is held out by its text, so it stays so when others are added."""
    validation_samples: int = 256
    """Largest number of samples in the validation set."""
    seed: int = 0
    """Seed of the order of the samples and of the choice of the validation set."""

    def __post_init__(self) -> None:
        for field in ("max_length", "batch_size", "multiple_of", "validation_samples"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1. Got {getattr(self, field)}.")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"`validation_share` must be above 0 and below 1. Got {self.validation_share}.")
        if self.max_tokens is not None and self.max_tokens < self.multiple_of * self.max_length:
            raise ValueError(
                "`max_tokens` must be at least `multiple_of` times `max_length`, "
                f"{self.multiple_of * self.max_length}. Got {self.max_tokens}."
            )


class SampleData(LightningDataModule, Generic[Item]):
    """Items of a source as samples with labels, divided into a training and a validation set.

    A batch is a dictionary with `input_ids`, `attention_mask` and `labels`, each of shape ``(B, T)``, padded on the
    right. Global batches do not depend on the number of replicas.

    Args:
        samples: How samples are tokenized, divided and batched.
    """

    def __init__(self, samples: SampleConfig) -> None:
        super().__init__()
        self.config = samples
        self.tokenizer = make_tokenizer(samples.tokenizer)
        self._sets: dict[str, list[Item]] = {}
        self._training: Samples | None = None
        self._validation: Samples | None = None

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """Returns what the source has, in the same order on every rank."""

    @abstractmethod
    def key(self, item: Item) -> str:
        """Returns the text by which an item is held out; items with the same text are on the same side."""

    @abstractmethod
    def sample(self, item: Item) -> Sample:
        """Returns the tokens and labels of an item."""

    def is_held_out(self, item: Item) -> bool:
        """Returns True for items of the validation set."""
        place = zlib.crc32(f"{self.config.seed} {self.key(item)}".encode()) / 2**32
        return place < self.config.validation_share

    def divided(self) -> dict[str, list[Item]]:
        """Returns the items of the sets `training` and `validation`."""
        if not self._sets:
            sets: dict[str, list[Item]] = {"training": [], "validation": []}
            for item in self.items():
                sets["validation" if self.is_held_out(item) else "training"].append(item)
            random.Random(self.config.seed).shuffle(sets["validation"])
            self._sets = sets
        return self._sets

    def setup(self, stage: str) -> None:
        """Reads and tokenizes the items of a stage.

        Args:
            stage: ``"fit"`` or ``"validate"``.
        """
        if stage == "fit" and self._training is None:
            self._training = self._tokenized("training")
        if stage in ("fit", "validate") and self._validation is None:
            self._validation = self._tokenized("validation", self.config.validation_samples)

    def train_dataloader(self) -> Loader:
        """Returns the loader of the training set, in an order given by the seed and the epoch."""
        return self._loader(self._training, training=True)

    def val_dataloader(self) -> Loader:
        """Returns the loader of the validation set."""
        return self._loader(self._validation, training=False)

    def first_samples(self, count: int) -> list[Sample]:
        """Returns the first training samples that have labels and are not too long."""
        found = []
        for item in self.divided()["training"]:
            if len(found) == count:
                break
            sample = self.sample(item)
            if self._fits(sample):
                found.append(sample)
        return found

    def tasks(self, count: int) -> list[Task]:
        """Returns the first tasks of the validation set, for `AnswerScore`."""
        held_out = (self.task(item) for item in self.divided()["validation"])
        fitting = (task for task in held_out if task is not None and len(task.prompt) < self.config.max_length)
        return [task for _, task in zip(range(count), fitting, strict=False)]

    def task(self, item: Item) -> Task | None:
        """Returns the task of a held-out item, or None if it has none."""
        raise NotImplementedError(f"{type(self).__name__} has no tasks. Remove the callback `AnswerScore`.")

    def score(self, tasks: Sequence[Task], answers: Sequence[str]) -> dict[str, float]:
        """Returns measures of the answers by name."""
        raise NotImplementedError(f"{type(self).__name__} has no tasks. Remove the callback `AnswerScore`.")

    def _fits(self, sample: Sample) -> bool:
        return sample.length <= self.config.max_length and any(label != IGNORED for label in sample.labels[1:])

    def _tokenized(self, name: str, limit: int | None = None) -> Samples:
        items = self.divided()[name]
        samples = [self.sample(item) for item in (items if limit is None else items[: 2 * limit])]
        kept = [sample for sample in samples if self._fits(sample)][:limit]
        if not kept:
            shortest = min((sample.length for sample in samples), default=0)
            raise ValueError(
                f"The {name} set has no samples of at most `max_length` = {self.config.max_length} tokens. "
                f"The source has {len(items)}, the shortest of {shortest} tokens. "
                "Raise `max_length` or `validation_share`, or give more data."
            )
        if limit is None and len(kept) < len(samples):
            rank_zero_info(
                f"{type(self).__name__}: {len(samples) - len(kept)} of {len(samples)} samples are left out: longer "
                f"than `max_length` = {self.config.max_length} tokens, or without a label."
            )
        return Samples(kept)

    def _loader(self, samples: Samples | None, *, training: bool) -> Loader:
        if samples is None:
            raise RuntimeError("The data must be read before it is loaded. Call `setup` with the stage first.")
        config, collate = self.config, Padding(self.tokenizer.pad)
        if config.max_tokens is None:
            size = share(config.batch_size, "batch_size", self.trainer)
            if training and len(samples) < config.batch_size:
                raise ValueError(f"`batch_size` is {config.batch_size}, but there are {len(samples)} samples.")
            order = EpochOrder(len(samples), shuffle=training, seed=config.seed)
            return DataLoader(samples, batch_size=size, sampler=order, drop_last=training, collate_fn=collate)
        batches = TokenBatchSampler(
            samples.lengths,
            config.max_tokens,
            multiple_of=config.multiple_of,
            shuffle=training,
            generator=torch.Generator().manual_seed(config.seed),
            drop_last=training,
        )
        share(config.multiple_of, "multiple_of", self.trainer)
        parts = replicas(self.trainer) if training else 1
        return DataLoader(samples, batch_sampler=SplitBatches(batches, parts), collate_fn=collate)
