"""Hybrid data- and model-parallel training for any LightningModule, from one Trainer argument."""

from lightning_hybrid._lightning_private import register_strategy
from lightning_hybrid._torch_private import warn_if_untested
from lightning_hybrid.checkpoint.elsewhere import name_the_remedy
from lightning_hybrid.checkpoint.options import CheckpointOptions
from lightning_hybrid.compare_layouts import verify
from lightning_hybrid.float8 import Float8Precision
from lightning_hybrid.spec.errors import CheckpointError, NonFiniteError, PartitionError, RankError
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.strategy import HybridStrategy

__all__ = [
    "CheckpointError",
    "CheckpointOptions",
    "Float8Precision",
    "HybridStrategy",
    "Layout",
    "NonFiniteError",
    "PartitionError",
    "RankError",
    "verify",
]

register_strategy(
    "hybrid", HybridStrategy, "Replicas, sharding, experts, tensors and a pipeline for any LightningModule"
)
name_the_remedy()
warn_if_untested()
