"""What the transformers of this package are made of."""

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
    """Latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from one small latent a token."""

    key_value: int
    """Width of the latent that keys and values are made from, C; all that a cache keeps beside the rotary key."""
    query: int | None = None
    """Width of the latent that queries are made from; None: queries are made from the hidden state."""
    rotary: int
    """Width of the part of queries and keys that is rotated, R; even. The key's is shared by all heads."""
    head: int
    """Width of the part of a head's queries and keys that is not rotated, K."""
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
        ValueError: If a token can't be given as many experts as asked for.
    """

    experts: int
    """Routed experts of a layer, E."""
    chosen: int
    """Routed experts that each token goes to, A."""
    hidden: int
    """Width inside each expert, F."""
    shared: int = 1
    """Experts that every token goes to; they are one feed-forward layer of `shared * hidden`."""
    dense_blocks: int = 1
    """Blocks at the start that keep a dense feed-forward layer."""
    groups: int = 1
    """Groups into which the experts are divided."""
    chosen_groups: int = 1
    """Groups that a token's experts come from."""
    scale: float = 1.0
    """Factor on the weights of a token's experts, which add up to 1 before; 2.5 in DeepSeek-V3."""
    bias_rate: float = 1e-3
    """By how much an expert's bias moves in a step, gamma; 0 switches balancing by bias off."""
    bias_share: float = 0.966
    """Share of the run in which biases move; DeepSeek-V3 stops for the last 0.5 of 14.8 T tokens."""
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
                f"`chosen` must be at most the experts that a token can choose from. Got {self.chosen} of {available} "
                f"({self.experts} experts in {self.groups} groups, of which {self.chosen_groups} are kept)."
            )


@dataclass(frozen=True, kw_only=True)
class PredictionConfig:
    """Multi-token prediction (DeepSeek-V3, section 2.2): while training, each position predicts further tokens too."""

    depth: int = 1
    """Further tokens, D of section 2.2."""
    weight: float = 0.3
    """Factor of their mean loss, lambda, at first."""
    later_weight: float = 0.1
    """Lambda later."""
    later_from: float = 0.676
    """Share of the run after which it is later; DeepSeek-V3: 10 of 14.8 T tokens."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "depth")
        _at_least(self, 0, "weight", "later_weight", "later_from")


@dataclass(frozen=True, kw_only=True)
class StreamsConfig:
    """Parallel streams (ParScale, arXiv:2505.10475): the same weights run several times on differing inputs."""

    count: int
    """Streams, P."""
    prefix: int = 48
    """Learned keys and values in front of each attention layer, by stream; 48 in the paper."""
    smoothing: float = 0.1
    """Share of the streams' weights that is spread evenly, epsilon."""
    freeze_backbone: bool = False
    """Train the prefixes and the aggregator only."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "count", "prefix")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"`smoothing` must be at least 0 and below 1. Got {self.smoothing}.")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer.

    Raises:
        ValueError: If the width can't be split into heads of an even width, or the heads into groups.
    """

    vocabulary: int = 256
    """Token values, V; 256 for bytes."""
    width: int = 128
    """Model width, D."""
    blocks: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads of a block, H."""
    context_length: int = 256
    """The longest sequence, in tokens."""
    key_value_heads: int | None = None
    """Heads of keys and values; each serves `heads / key_value_heads` heads. None: one for every head."""
    feed_forward: int | None = None
    """Width inside dense feed-forward layers, F; None: 8/3 of the width, in multiples of 32."""
    latent: LatentConfig | None = None
    """Latent attention instead of attention with keys and values of full width."""
    experts: ExpertsConfig | None = None
    """A mixture of experts instead of dense feed-forward layers."""
    prediction: PredictionConfig | None = None
    """Multi-token prediction."""
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
                f"`key_value_heads` has no meaning with `latent`, whose latent serves all heads. "
                f"Got {self.key_value_heads}. Leave one of them out."
            )

    @property
    def feed_forward_width(self) -> int:
        """F: 8/3 D unless it is given, so that three matrices cost what two of 4 D do, in multiples of 32."""
        return self.feed_forward or math.ceil(8 * self.width / 3 / 32) * 32


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of a run and its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """`"muon"`: Muon for the matrices of blocks, experts included, AdamW for embedding, head, router and norms."""
    learning_rate: float = 3e-3
    """The peak."""
    weight_decay: float = 0.1
    """Of matrices only."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises to its peak."""
    schedule: Literal["cosine", "stable"] = "cosine"
    """After the warm-up: a half cosine to a tenth, or the peak until a linear decay to zero at the end."""
    decay_share: float = 0.2
    """Share of the run in which the `stable` schedule decays."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """In which precision the optimizer keeps its moments; bfloat16 as DeepSeek-V3, section 3.3.3."""

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
    """Returns a config as it is, or makes it from the nested dictionaries that hyperparameters are saved as."""
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
