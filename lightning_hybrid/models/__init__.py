"""Models as ordinary LightningModules: examples of what a user brings."""

from lightning_hybrid.models.causal_lm import CausalLM, learning_rate_share
from lightning_hybrid.models.transformer import Transformer, rotary_table, rotate

__all__ = ["CausalLM", "Transformer", "learning_rate_share", "rotary_table", "rotate"]
