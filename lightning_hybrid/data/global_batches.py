"""Global batches that do not depend on the number of replicas."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch import Trainer
from torch.utils.data import Sampler

from lightning_hybrid.data.token_batches import TokenBatch, TokenBatchSampler


def replicas(trainer: Trainer | None) -> int:
    """Returns the number of data-parallel replicas."""
    layout = trainer.distributed_sampler_kwargs if trainer is not None else None
    return layout["num_replicas"] if layout else 1


def share(value: int, argument: str, trainer: Trainer | None) -> int:
    """Returns the part of one replica.

    Raises:
        ValueError: If replicas would have parts of different sizes.
    """
    count = replicas(trainer)
    if value % count:
        raise ValueError(
            f"`{argument}` is that of the global batch and must be a multiple of the {count} data-parallel "
            f"replicas. Got {value}. Use {value // count * count or count}."
        )
    return value // count


class EpochOrder(Sampler[int]):
    """All indices, in an order given by the seed and the epoch.

    Args:
        size: Number of indices.
        shuffle: True: shuffle the indices.
        seed: Seed of the order.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int) -> None:
        self._size, self._shuffle, self._seed, self._epoch = size, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the next epoch. Called by Lightning."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        if not self._shuffle:
            return iter(range(self._size))
        generator = torch.Generator()
        generator.manual_seed(self._seed + self._epoch)
        return iter(torch.randperm(self._size, generator=generator).tolist())


class SplitBatches(Sampler[TokenBatch]):
    """Batches of a token budget, each divided into equal parts.

    `HybridStrategy` gives batches r, r + R, ... to replica r of R. So the parts of a batch are a global batch.

    Args:
        batches: The global batches; the number of samples of each is a multiple of `parts`.
        parts: Number of replicas.
    """

    def __init__(self, batches: TokenBatchSampler, parts: int) -> None:
        self._batches, self._parts = batches, parts
        self.generator = batches.generator

    def __len__(self) -> int:
        return len(self._batches) * self._parts

    def __iter__(self) -> Iterator[TokenBatch]:
        for batch in self._batches:
            for part in range(self._parts):
                yield TokenBatch(batch[part :: self._parts], batch.lengths[part :: self._parts])
