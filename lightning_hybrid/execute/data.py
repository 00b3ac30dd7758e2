"""Which samples a rank sees: those of its replica, in the order in which one process would see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import has_iterable_dataset
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler, Sampler, SequentialSampler

from lightning_hybrid.partition.mesh import Mesh


class AgreedSampler(Sampler):
    """The order of `sampler`, with random streams that `agree` makes equal on all ranks before every epoch."""

    def __init__(self, sampler: Any, agree: Callable[[], None]) -> None:
        self.sampler, self._agree = sampler, agree

    def __iter__(self) -> Iterator[Any]:
        self._agree()
        return iter(list(self.sampler))

    def __len__(self) -> int:
        return len(self.sampler)


def replica_loader(loader: object, mesh: Mesh, trainer: pl.Trainer, agree: Callable[[], None]) -> object:
    """Gives each replica its share of `loader`: sample r, r + n, r + 2n, ... of the order of the user's own sampler.

    Then the k-th batches of the n replicas are together the k-th batch of one process with the n-fold batch size.
    Lightning's own injection would shuffle with another seed, and would shuffle sequential training loaders too.
    Loaders of iterable datasets, with a distributed sampler, or of other types than DataLoader are left alone, and
    those for predictions, which Lightning splits without repeating samples.
    """
    if trainer.state.fn == TrainerFn.PREDICTING or not isinstance(loader, DataLoader) or has_iterable_dataset(loader):
        return loader
    sampler: Any = loader.sampler
    if isinstance(sampler, DistributedSampler) or not hasattr(sampler, "__len__"):
        return loader
    ordered = sampler if isinstance(sampler, SequentialSampler) else AgreedSampler(sampler, agree)
    if mesh.layout.replicas > 1:
        n = mesh.layout.replicas
        ordered = DistributedSamplerWrapper(ordered, num_replicas=n, rank=mesh.replica, shuffle=False)
    if ordered is sampler:
        return loader
    return _update_dataloader(loader, ordered)  # type: ignore[arg-type]
