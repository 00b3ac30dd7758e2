"""Configurations of the models of this package."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

_Config = TypeVar("_Config")


def _at_least(config: Any, least: int, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value is not None and value < least:
            raise ValueError(f"`{field}` must be at least {least}. Got {value}.")


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from one latent per token."""

    key_value: int
    """Width of the latent of keys and values, C; the cache holds only this latent and the rotary key."""
    query: int | None = None
    """Width of the latent of queries; None: queries are projected from the hidden state."""
    rotary: int
    """Width of the rotated part of queries and keys, R; even. All heads share the rotated part of the key."""
    head: int
    """Width of the part of a head's queries and keys without rotation, K."""
    value: int
    """Width of a head's values."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "key_value", "query", "rotary", "head", "value")
        if self.rotary % 2:
            raise ValueError(f"`rotary` must be even: pairs of elements are rotated. Got {self.rotary}.")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of feed-forward layers (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    Raises:
        ValueError: If `chosen` exceeds the experts available to a token, or a value is out of range.
    """

    experts: int
    """Routed experts per layer, E."""
    chosen: int
    """Routed experts per token, A."""
    hidden: int
    """Width inside each expert, F."""
    shared: int = 1
    """Shared experts, used by every token: one feed-forward layer of width `shared * hidden`."""
    dense_blocks: int = 1
    """Number of initial blocks with a dense feed-forward layer."""
    groups: int = 1
    """Number of groups of experts."""
    chosen_groups: int = 1
    """Number of groups from which a token's experts are chosen."""
    scale: float = 1.0
    """Factor on the normalized weights of a token's experts; 2.5 in DeepSeek-V3."""
    bias_rate: float = 1e-3
    """Update of an expert's bias per step, gamma; 0 disables balancing by bias."""
    bias_share: float = 0.966
    """Share of the run in which biases are updated; DeepSeek-V3 stops for the last 0.5 of 14.8 T tokens."""
    balance_loss: float = 1e-4
    """Factor of the sequence-wise balance loss, alpha."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "experts", "chosen", "hidden", "groups", "chosen_groups")
        _at_least(self, 0, "shared", "dense_blocks", "bias_rate", "balance_loss")
        if self.experts % self.groups or (self.groups > 1 and self.experts < 2 * self.groups):
            raise ValueError(
                f"`groups` must divide `experts` into groups of at least 2. Got {self.groups} groups of "
                f"{self.experts} experts. Use a divisor of {self.experts} up to {self.experts // 2}, or 1."
            )
        if self.chosen_groups > self.groups:
            raise ValueError(
                f"`chosen_groups` must be at most `groups`. Got {self.chosen_groups} of {self.groups} groups."
            )
        available = self.experts // self.groups * self.chosen_groups
        if self.chosen > available:
            raise ValueError(
                f"`chosen` must be at most the experts that are available to a token. Got {self.chosen} of {available} "
                f"({self.experts} experts in {self.groups} groups, of which {self.chosen_groups} are chosen)."
            )


@dataclass(frozen=True, kw_only=True)
class PredictionConfig:
    """Multi-token prediction (DeepSeek-V3, section 2.2): in training, each position also predicts further tokens."""

    depth: int = 1
    """Number of further tokens, D of section 2.2."""
    weight: float = 0.3
    """Initial factor of their mean loss, lambda."""
    later_weight: float = 0.1
    """Factor after `later_from`."""
    later_from: float = 0.676
    """Share of the run after which `later_weight` applies; DeepSeek-V3: 10 of 14.8 T tokens."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "depth")
        _at_least(self, 0, "weight", "later_weight", "later_from")


@dataclass(frozen=True, kw_only=True)
class StreamsConfig:
    """Parallel streams (ParScale, arXiv:2505.10475): the same weights run several times on different inputs."""

    count: int
    """Number of streams, P."""
    prefix: int = 48
    """Length of the learned prefix of keys and values per attention layer and stream; 48 in the paper."""
    smoothing: float = 0.1
    """Share of the aggregation weights that is uniform over streams, epsilon."""
    freeze_backbone: bool = False
    """Train only the prefixes and the aggregator."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "count", "prefix")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"`smoothing` must be at least 0 and below 1. Got {self.smoothing}.")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer.

    Raises:
        ValueError: If the width cannot be split into heads of an even width, or the heads into groups.
    """

    vocabulary: int = 256
    """Number of token values, V; 256 for bytes."""
    width: int = 128
    """Model width, D."""
    blocks: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads per block, H."""
    context_length: int = 256
    """The longest sequence, in tokens."""
    key_value_heads: int | None = None
    """Heads of keys and values, each shared by `heads / key_value_heads` query heads. None: `heads`."""
    feed_forward: int | None = None
    """Inner width of dense feed-forward layers, F; None: 8/3 of the width, rounded up to a multiple of 32."""
    latent: LatentConfig | None = None
    """Multi-head latent attention; None: attention with keys and values of full width."""
    experts: ExpertsConfig | None = None
    """Mixture of experts; None: dense feed-forward layers."""
    prediction: PredictionConfig | None = None
    """Multi-token prediction; None: next token only."""
    initial_std: float = 0.02
    """Standard deviation of initial weights: GPT-2 (Radford et al. 2019), section 2.3; 0.006 in DeepSeek-V3."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "vocabulary", "width", "blocks", "heads", "context_length", "key_value_heads")
        _at_least(self, 1, "feed_forward")
        if self.latent is None and self.width % (2 * self.heads):
            raise ValueError(
                f"`width` must be a multiple of 2 * `heads`, so that each head has an even width to rotate. "
                f"Got width {self.width} with {self.heads} heads. "
                f"Use {max(1, round(self.width / (2 * self.heads))) * 2 * self.heads}."
            )
        if self.heads % (self.key_value_heads or self.heads):
            raise ValueError(
                f"`key_value_heads` must divide `heads`. Got {self.key_value_heads} for {self.heads} heads."
            )
        if self.latent is not None and self.key_value_heads is not None:
            raise ValueError(
                f"`key_value_heads` cannot be combined with `latent`, whose latent is shared by all heads. "
                f"Got {self.key_value_heads}. Leave one of them out."
            )

    @property
    def feed_forward_width(self) -> int:
        """F, by default 8/3 D rounded up to a multiple of 32: three matrices of it cost as much as two of 4 D."""
        return self.feed_forward or math.ceil(8 * self.width / 3 / 32) * 32


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of a run and its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """`"muon"`: Muon for the matrices of blocks, experts included, AdamW for embedding, head, router and norms."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Weight decay, applied to matrices only."""
    warmup_steps: int = 50
    """Steps of linear warm-up to the peak."""
    schedule: Literal["cosine", "stable"] = "cosine"
    """After the warm-up: a half cosine to a tenth of the peak, or constant with a linear decay to zero at the end."""
    decay_share: float = 0.2
    """Share of the run in which the `stable` schedule decays."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the optimizer's moments; bfloat16 as in DeepSeek-V3, section 3.3.3."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "learning_rate", "weight_decay", "warmup_steps")
        for field, choices in (
            ("name", ("adamw", "muon")),
            ("schedule", ("cosine", "stable")),
            ("moments", ("float32", "bfloat16")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"`{field}` must be one of {', '.join(choices)}. Got {getattr(self, field)!r}.")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"`decay_share` must be above 0 and at most 1. Got {self.decay_share}.")


def config_of(kind: type[_Config], value: _Config | Mapping[str, Any]) -> _Config:
    """Returns `value` if it is a `kind`, otherwise builds one from nested dictionaries (saved hyperparameters)."""
    if isinstance(value, kind):
        return value
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for name, entry in typing.cast(Mapping[str, Any], value).items():
        inner = _config_in(hints.get(name))
        fields[name] = config_of(inner, entry) if inner is not None and isinstance(entry, Mapping) else entry
    return kind(**fields)


def _config_in(hint: Any) -> type | None:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((c for c in choices if dataclasses.is_dataclass(c) and isinstance(c, type)), None)
