"""DeepSeek-V3 components and ParScale as ordinary modules, and a LightningModule that combines them: user code."""

from lightning_hybrid.models.causal_lm import CausalLM
from lightning_hybrid.models.config import (
    ExpertsConfig,
    LatentConfig,
    OptimizerConfig,
    PredictionConfig,
    StreamsConfig,
    TransformerConfig,
)
from lightning_hybrid.models.experts import MixtureOfExperts
from lightning_hybrid.models.latent_attention import LatentAttention
from lightning_hybrid.models.optimizers import AdamWBF16, Muon
from lightning_hybrid.models.pretrained import PretrainedLM
from lightning_hybrid.models.supervised import SupervisedLM
from lightning_hybrid.models.transformer import Transformer

__all__ = [
    "AdamWBF16",
    "CausalLM",
    "ExpertsConfig",
    "LatentAttention",
    "LatentConfig",
    "MixtureOfExperts",
    "Muon",
    "OptimizerConfig",
    "PredictionConfig",
    "PretrainedLM",
    "StreamsConfig",
    "SupervisedLM",
    "Transformer",
    "TransformerConfig",
]
