"""A decoder-only transformer: dense (Llama), or with DeepSeek-V3 components.

Dims in the suffixes of tensor names: B batch, T time (tokens of a window), D model width, V vocabulary, P streams.

References:
    Touvron et al., LLaMA, arXiv:2302.13971 (dense architecture).
    DeepSeek-V3, arXiv:2412.19437 (latent attention, experts, multi-token prediction).
    Chen et al., ParScale, arXiv:2505.10475 (parallel streams).
"""

from __future__ import annotations

import math
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hybrid.models.attention import Attention, Cache, rotary_table
from lightning_hybrid.models.config import StreamsConfig, TransformerConfig
from lightning_hybrid.models.experts import MixtureOfExperts
from lightning_hybrid.models.feed_forward import FeedForward
from lightning_hybrid.models.latent_attention import LatentAttention
from lightning_hybrid.models.norm import RMSNorm
from lightning_hybrid.models.prediction import FurtherToken
from lightning_hybrid.models.streams import StreamAggregator

_RESIDUAL = ("out_proj.weight", "down_proj.weight", "down_proj")
"""Name endings of weights that write to the residual stream."""


class Block(nn.Module):
    """Attention and a feed-forward layer, each with pre-normalization and a residual connection.

    Args:
        config: Configuration of the transformer.
        experts: True: the feed-forward layer is the mixture of experts of `config`.
    """

    def __init__(self, config: TransformerConfig, experts: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        if config.latent is None:
            self.attention: Attention | LatentAttention = Attention(config.width, config.heads, config.key_value_heads)
        else:
            self.attention = LatentAttention(config.width, config.heads, config.latent)
        self.feed_forward_norm = RMSNorm(config.width)
        if experts and config.experts is not None:
            self.feed_forward: FeedForward | MixtureOfExperts = MixtureOfExperts(config.width, config.experts)
        else:
            self.feed_forward = FeedForward(config.width, config.feed_forward_width)

    def forward(
        self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: Cache | None = None, balance: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens, then transform each.

        Args:
            x_BTD: The residual stream.
            cos_TR: Cosines of the rotation angles.
            sin_TR: Sines of the rotation angles.
            cache: Cache of previous tokens; extended by these tokens.
            balance: Sum of the balance losses of previous blocks, a scalar; None if there are none.

        Returns:
            The residual stream, and the balance losses including this block's.
        """
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TR, sin_TR, cache)
        y_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        if isinstance(y_BTD, tuple):
            y_BTD, loss = y_BTD
            balance = loss if balance is None else balance + loss
        return x_BTD + y_BTD, balance


class Losses(NamedTuple):
    """The parts of the training loss, scalars in nats."""

    next_token: Tensor
    """Mean cross entropy of the next token."""
    further_tokens: Tensor
    """Mean over depths of the mean cross entropy of further tokens; 0 if none are predicted."""
    balance: Tensor
    """Sum of the balance losses of all blocks; 0 without experts."""


class Transformer(nn.Module):
    """Embedding, a stack of blocks, a final norm and a head.

    Args:
        config: Configuration.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dense = config.blocks if config.experts is None else config.experts.dense_blocks
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, experts=i >= dense) for i in range(config.blocks))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.further = nn.ModuleList(
            FurtherToken(config.width, Block(config, experts=config.experts is not None))
            for _ in range(0 if config.prediction is None else config.prediction.depth)
        )
        self.register_module("aggregator", None)
        rotated = config.width // config.heads if config.latent is None else config.latent.rotary
        cos_TR, sin_TR = rotary_table(config.context_length, rotated)
        self.register_buffer("rotary_cos", cos_TR, persistent=False)
        self.register_buffer("rotary_sin", sin_TR, persistent=False)
        self._initialize()

    @overload
    def forward(self, tokens_BT: Tensor, targets_BT: None = None, cache: Cache | None = None) -> Tensor: ...

    @overload
    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Losses: ...

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor | Losses:
        """Predict the token after each position; with targets, compute the losses.

        Args:
            tokens_BT: Token values, at most ``context_length`` including those in the cache.
            targets_BT: The token after each position.
            cache: Cache of previous tokens; extended by these tokens.

        Returns:
            Unnormalized log-probabilities, ``logits_BTV``. With targets, the parts of the loss instead, unweighted
            except for the factor ``balance_loss`` of the experts.
        """
        x_BTD, balance = self._blocks(tokens_BT, cache)
        logits_BTV = self.head(self._combined(x_BTD))
        return logits_BTV if targets_BT is None else self._losses(logits_BTV, targets_BT, x_BTD, balance)

    def _losses(self, logits_BTV: Tensor, targets_BT: Tensor, x_BTD: Tensor, balance: Tensor | None) -> Losses:
        next_token = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        further = []
        for module in self.further:
            # position i sees tokens up to i + depth; the last one is a target of the previous depth
            known_BT, targets_BT = targets_BT[:, :-1], targets_BT[:, 1:]
            cos_TR, sin_TR = self._rotations(0, known_BT.shape[1])
            x_BTD, balance = module(x_BTD[:, :-1], self.embedding(known_BT), cos_TR, sin_TR, balance)
            logits_BTV = self.head(module.final_norm(x_BTD))  # type: ignore[operator]
            further.append(F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()))
        none = next_token.new_zeros(())
        mean = torch.stack(further).mean() if further else none
        return Losses(next_token, mean, none if balance is None else balance)

    def open_streams(self, config: StreamsConfig) -> None:
        """Switch from one stream to several, in place; names and values of existing weights do not change.

        Raises:
            ValueError: If several streams are open already, or with multi-token prediction.
        """
        if self.aggregator is not None:
            raise ValueError("`streams` can be opened once. This transformer has several streams already.")
        if len(self.further):
            raise ValueError(
                f"`streams` and `prediction` exclude each other. Got a prediction of depth {len(self.further)}. "
                "Remove `prediction` in the phase with streams: multi-token prediction is for the first phase only."
            )
        for module in self.modules():
            if isinstance(module, Attention | LatentAttention):
                module.open_prefix(config.count, config.prefix, self.config.initial_std)
        self.aggregator = StreamAggregator(config, self.config.width, self.config.initial_std)
        if config.freeze_backbone:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith("aggregator.") or ".prefix." in name)

    def _blocks(self, tokens_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream after the last block, with all streams along the batch, and the balance losses."""
        start = 0 if cache is None else cache.length
        cos_TR, sin_TR = self._rotations(start, tokens_BT.shape[1])
        x_BTD = self.embedding(tokens_BT)
        if self.aggregator is not None:
            x_BTD = x_BTD.repeat(self.aggregator.config.count, 1, 1)
        balance = None
        for block in self.blocks:
            x_BTD, balance = block(x_BTD, cos_TR, sin_TR, cache, balance)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return x_BTD, balance

    def _combined(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.norm(x_BTD)
        return x_BTD if self.aggregator is None else self.aggregator(x_BTD)

    def _rotations(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        return self.rotary_cos[start : start + length], self.rotary_sin[start : start + length]

    def _initialize(self) -> None:
        # Two layers per block write to the residual stream; its variance must not grow with depth.
        std = self.config.initial_std
        residual_std = std / math.sqrt(2 * self.config.blocks)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=residual_std if name.endswith(_RESIDUAL) else std)
