"""Hybrid data- and model-parallel training for any LightningModule, from one Trainer argument."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_hybrid.checkpoint.options import CheckpointOptions
from lightning_hybrid.execute.start import warn_if_untested
from lightning_hybrid.execute.strategy import HybridStrategy
from lightning_hybrid.spec.errors import CheckpointError, NonFiniteError, PartitionError, RankError
from lightning_hybrid.spec.layout import Layout

__all__ = [
    "CheckpointError",
    "CheckpointOptions",
    "HybridStrategy",
    "Layout",
    "NonFiniteError",
    "PartitionError",
    "RankError",
]

StrategyRegistry.register(
    "hybrid", HybridStrategy, description="Replicas, sharding, tensor and pipeline parallelism for any LightningModule"
)
warn_if_untested()
