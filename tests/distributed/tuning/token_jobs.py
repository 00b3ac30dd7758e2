"""Runs on samples of different lengths, in batches of a token budget, and what one process computes in their place."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_hybrid.adapt.shares import sequence_cost
from lightning_hybrid.callbacks import AdaptiveBatchSize, LoadRebalancing
from lightning_hybrid.data import TokenBatchSampler
from tests.distributed.callbacks.adaptive_jobs import SaveAt, ShortOfMemory
from tests.distributed.jobs import Block, quiet, trainer_for, weights

PADDING = -100


class Sequences(Dataset):
    """Random tokens, of 4 to 40 in a sample, and for each of them a class."""

    def __init__(self, count: int = 120) -> None:
        generator = torch.Generator().manual_seed(1)
        self.lengths = (4 + 37 * torch.rand(count, generator=generator) ** 2).long().tolist()
        self.samples = [torch.randint(32, (n,), generator=generator) for n in self.lengths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.samples[index]
        return tokens, (tokens * 3 + torch.arange(len(tokens))) % 8


def padded(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    tokens, classes = ([s[i] for s in samples] for i in (0, 1))
    return {
        "tokens": pad_sequence(tokens, batch_first=True),
        "classes": pad_sequence(classes, batch_first=True, padding_value=PADDING),
    }


class Tagger(L.LightningModule):
    """Classes of tokens; the loss is the mean over the tokens of its batch, or over its samples."""

    def __init__(self, fits: dict[int, int] | None = None, over: str = "tokens") -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))
        self.head = nn.Linear(16, 8)
        self.over = over
        self.fits, self.starts = fits, False
        """By rank: elements of a microbatch that its memory has room for; once the module is partitioned."""
        self.shapes: list[tuple[int, ...]] = []

    def on_fit_start(self):
        self.starts = True

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        size = batch["tokens"].numel()
        if self.fits is not None and self.starts and size > self.fits[torch.distributed.get_rank()]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.loss(batch)

    def loss(self, batch):
        logits = self(batch["tokens"])
        if self.over == "samples":
            losses = nn.functional.cross_entropy(logits.mT, batch["classes"], ignore_index=PADDING, reduction="none")
            return (losses.sum(1) / (batch["classes"] != PADDING).sum(1)).mean()
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["classes"].flatten(), ignore_index=PADDING)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Seen(L.Callback):
    """The shape of every training batch of this rank, and the budget of every epoch."""

    def __init__(self, sampler: TokenBatchSampler) -> None:
        self._sampler = sampler
        self.shapes: list[tuple[int, ...]] = []
        self.budgets: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.shapes.append(tuple(batch["tokens"].shape))
        if batch_idx == 0:
            self.budgets.append(self._sampler.max_tokens)


def train(
    layout: str | None,
    *,
    max_tokens: int = 96,
    shuffle: bool = True,
    multiple_of: int = 1,
    adaptive: dict[str, Any] | None = None,
    fits: dict[int, int] | None = None,
    save: str | None = None,
    save_at: int = 0,
    ckpt_path: str | None = None,
    short_of_memory_at: tuple[int, ...] = (),
    workers: int = 0,
    over: str = "tokens",
    **options: Any,
) -> dict[str, Any]:
    """A run's weights, and the shapes of its batches."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, data = Tagger(fits, over), Sequences()
    sampler = TokenBatchSampler(data.lengths, max_tokens, shuffle=shuffle, multiple_of=multiple_of)
    seen = Seen(sampler)
    callbacks: list[L.Callback] = [seen]
    if adaptive is not None:
        callbacks.insert(0, AdaptiveBatchSize(**adaptive))
    if short_of_memory_at:
        callbacks.insert(0, ShortOfMemory(short_of_memory_at))
    if save is not None:
        callbacks.append(SaveAt(save, save_at))
    trainer, _ = trainer_for(layout, callbacks=callbacks, **options)
    context = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    loader: Any = DataLoader(data, batch_sampler=sampler, collate_fn=padded, **context)
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=False)
    return {
        "weights": weights(trainer, module),
        "shapes": seen.shapes,
        "budgets": seen.budgets,
        "budget afterwards": sampler.max_tokens,
        "steps": trainer.global_step,
    }


def by_length(layout: str, balanced: bool, **options: Any) -> dict[str, Any]:
    """A run on batches of 16 samples, and the tokens of this rank's batches."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, data = Tagger(), Sequences()
    seen = Tokens()
    callbacks: list[L.Callback] = [seen, *([LoadRebalancing(lengths=data.lengths, width=4)] if balanced else [])]
    trainer, replicas = trainer_for(layout, callbacks=callbacks, **options)
    trainer.fit(module, DataLoader(data, batch_size=16 // replicas, collate_fn=padded))
    return {"weights": weights(trainer, module), "tokens": seen.found, "steps": trainer.global_step}


class Tokens(L.Callback):
    """The cost of every training batch of this rank, padding not included."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        lengths = (batch["classes"] != PADDING).sum(1).tolist()
        self.found.append(sum(sequence_cost(n, 4) for n in lengths))


def of_whole_batches(size: int) -> dict[str, Any]:
    """Steps on the mean over all tokens of `size` samples."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, data, steps = Tagger(), Sequences(), 0
    optimizer: Any = module.configure_optimizers()
    for start in range(0, len(data), size):
        optimizer.zero_grad()
        module.loss(padded([data[i] for i in range(start, min(start + size, len(data)))])).backward()
        optimizer.step()
        steps += 1
    return {"weights": module.state_dict(), "steps": steps}


def of_one_process(together: int, *, max_tokens: int = 96, multiple_of: int = 1, epochs: int = 1) -> dict[str, Any]:
    """Steps on the mean over all tokens of `together` batches, run one after the other."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, data, steps = Tagger(), Sequences(), 0
    sampler = TokenBatchSampler(data.lengths, max_tokens, shuffle=False, multiple_of=multiple_of)
    optimizer: Any = module.configure_optimizers()
    for _ in range(epochs):
        batches = list(sampler)
        for start in range(0, len(batches), together):
            samples = [data[i] for batch in batches[start : start + together] for i in batch]
            optimizer.zero_grad()
            module.loss(padded(samples)).backward()
            optimizer.step()
            steps += 1
    return {"weights": module.state_dict(), "steps": steps}
