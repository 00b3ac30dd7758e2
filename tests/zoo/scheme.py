"""The models of this package, as a user of theirs has them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.models import (
    CausalLM,
    ExpertsConfig,
    LatentConfig,
    PredictionConfig,
    StreamsConfig,
    TransformerConfig,
)
from tests.zoo.case import SEQUENCE, VOCABULARY, Case, token_ids

LATENT = LatentConfig(key_value=16, query=24, rotary=8, head=8, value=16)
EXPERTS = ExpertsConfig(experts=4, chosen=2, hidden=32, balance_loss=0.1, bias_rate=0.01)
GROUPS = ExpertsConfig(experts=8, chosen=2, hidden=16, groups=4, chosen_groups=2, shared=0, dense_blocks=0)


class PlainCausalLM(CausalLM):
    """Plain SGD, whose update is the gradient."""

    def configure_optimizers(self) -> Any:
        """SGD on all trainable parameters."""
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def _build(streams: StreamsConfig | None = None, **options: Any) -> PlainCausalLM:
    config = TransformerConfig(
        vocabulary=VOCABULARY, width=64, blocks=4, heads=4, context_length=SEQUENCE, initial_std=0.1, **options
    )
    return PlainCausalLM(config, streams=streams)


def _text(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = token_ids(generator, SEQUENCE + 1)
    return tokens[:-1], tokens[1:]


CASES = [
    Case(
        name="scheme",
        build=partial(_build, latent=LATENT, experts=EXPERTS, prediction=PredictionConfig(depth=1)),
        sample=_text,
    ),
    Case(name="expert_groups", build=partial(_build, experts=GROUPS, key_value_heads=2), sample=_text, slow=True),
    Case(name="streams", build=partial(_build, StreamsConfig(count=2, prefix=4)), sample=_text),
    Case(
        name="frozen_streams",
        build=partial(_build, StreamsConfig(count=2, prefix=4, freeze_backbone=True), latent=LATENT),
        sample=_text,
        slow=True,
    ),
]
