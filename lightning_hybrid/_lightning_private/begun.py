"""A trainer that is as at the first batch, before Lightning has set up its loops and optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.core.optimizer import LightningOptimizer, _init_optimizers_and_lr_schedulers
from lightning.pytorch.utilities import CombinedLoader

from lightning_hybrid._lightning_private.loaders import loop_loaders
from lightning_hybrid._lightning_private.packages import of_package, twins
from lightning_hybrid.patching import patched


@contextmanager
def training_loaders_set(trainer: pl.Trainer) -> Iterator[None]:
    """Sets the loaders of the training loop and the number of batches for the duration of the context."""
    loop = trainer.fit_loop
    if loop._combined_loader is not None:
        yield
        return
    loaders = loop_loaders(trainer)
    combined: Any = loaders
    if not isinstance(loaders, twins(CombinedLoader)):
        combined = of_package(trainer, CombinedLoader)(loaders, "max_size_cycle")
    lengths = [sized_len(loader) for loader in combined.flattened]
    batches: float = max((n for n in lengths if n is not None), default=float("inf"))
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit) if batches < 1e30 else batches
    with patched(loop, _combined_loader=combined, max_batches=batches):
        yield


@contextmanager
def fresh_optimizers_set(trainer: pl.Trainer) -> Iterator[None]:
    """Configures new optimizers and schedulers, which the trainer has for the duration of the context."""
    strategy: Any = trainer.strategy
    if strategy.optimizers:
        yield
        return
    optimizers, schedulers = of_package(trainer, _init_optimizers_and_lr_schedulers)(trainer.lightning_module)
    wrapped = [
        of_package(trainer, LightningOptimizer)._to_lightning_optimizer(optimizer, strategy) for optimizer in optimizers
    ]
    with patched(strategy, _optimizers=optimizers, _lightning_optimizers=wrapped, lr_scheduler_configs=schedulers):
        yield
