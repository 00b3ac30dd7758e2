"""The strategy that the callbacks of this package require."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.strategy import HybridStrategy


def hybrid_strategy(trainer: pl.Trainer, callback: Callback) -> HybridStrategy:
    """Returns the trainer's `HybridStrategy`.

    Raises:
        PartitionError: If the trainer has another strategy.
    """
    if not isinstance(trainer.strategy, HybridStrategy):
        raise PartitionError(
            f"`{type(callback).__name__}` needs `strategy=HybridStrategy(...)`. Got {type(trainer.strategy).__name__}."
        )
    return trainer.strategy
