"""Causal self-attention with rotary positions, a cache for generation and learned prefixes.

Dims in the suffixes of tensor names: B batch, T time (tokens of a window), S sources (attended positions: prefix,
cached and new tokens), D model width, H heads, G heads of keys and values, K width of a head, P streams, L prefix.

References:
    Su et al., RoFormer, arXiv:2104.09864 (rotary position embedding).
    Ainslie et al., GQA, arXiv:2305.13245 (fewer heads of keys and values).
    Chen et al., ParScale, arXiv:2505.10475 (a prefix for each stream).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROTARY_BASE = 10_000.0
"""RoFormer, section 3.4.2: the base of the geometric series of wavelengths."""


class Cache:
    """Key-value cache of all attention layers, so that generation runs each token once."""

    def __init__(self) -> None:
        self._kept: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.length = 0
        """Number of cached tokens."""

    def extend(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Appends a layer's tensors of new tokens along the second to last dim; returns the tensors of all tokens."""
        if layer in self._kept:
            new = tuple(torch.cat(pair, dim=-2) for pair in zip(self._kept[layer], new, strict=True))
        self._kept[layer] = new
        return new


class Prefix(nn.Module):
    """Learned keys and values per stream, attended by every token of the stream (ParScale, section 3.1).

    Args:
        streams: Number of streams, P.
        length: Length of the prefix, L.
        heads: Heads of keys and values, G.
        key_width: Width of a head's keys.
        value_width: Width of a head's values.
        std: Standard deviation of the initial values.
    """

    def __init__(self, streams: int, length: int, heads: int, key_width: int, value_width: int, std: float) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(streams, heads, length, key_width))
        self.values = nn.Parameter(torch.empty(streams, heads, length, value_width))
        nn.init.normal_(self.keys, std=std)
        nn.init.normal_(self.values, std=std)

    def forward(self, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values with the prefix of each stream in front; the batch is ordered by stream."""
        copies = k_BGSK.shape[0] // self.keys.shape[0]
        keys, values = (p.repeat_interleave(copies, dim=0) for p in (self.keys, self.values))
        return torch.cat([keys.to(k_BGSK.dtype), k_BGSK], dim=-2), torch.cat([values.to(v_BGSK.dtype), v_BGSK], dim=-2)


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding.

    Args:
        width: Model width, D.
        heads: Number of heads, H; D / H = K must be even.
        key_value_heads: Heads of keys and values, G; None: H.
    """

    prefix: Prefix | None

    def __init__(self, width: int, heads: int, key_value_heads: int | None = None) -> None:
        super().__init__()
        self.head_width = width // heads
        self.key_value_heads = key_value_heads or heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, self.key_value_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, self.key_value_heads * self.head_width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.register_module("prefix", None)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, cache: Cache | None = None) -> Tensor:
        """Mix each position with those before it.

        Args:
            x_BTD: Normalized hidden states.
            cos_TK: Cosines of the rotation angles.
            sin_TK: Sines of the rotation angles.
            cache: Keys and values of previous tokens; extended by these tokens.

        Returns:
            The update of the residual stream, of the shape of ``x_BTD``.
        """
        q_BHTK = rotate(self._split_heads(self.q_proj(x_BTD)), cos_TK, sin_TK)
        k_BGSK = rotate(self._split_heads(self.k_proj(x_BTD)), cos_TK, sin_TK)
        v_BGSK = self._split_heads(self.v_proj(x_BTD))
        if cache is not None:
            k_BGSK, v_BGSK = cache.extend(self, k_BGSK, v_BGSK)
        mixed_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, self.prefix)
        return self.out_proj(mixed_BHTK.transpose(1, 2).flatten(2))

    def open_prefix(self, streams: int, length: int, std: float) -> None:
        """Adds learned keys and values for each stream."""
        self.prefix = Prefix(streams, length, self.key_value_heads, self.head_width, self.head_width, std)

    def _split_heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, prefix: Prefix | None = None) -> Tensor:
    """Mix values by attention: softmax(q k / sqrt(K)) v, over the prefix, earlier tokens and the token itself.

    Args:
        q_BHTK: Queries of the last T tokens.
        k_BGSK: Keys of all tokens.
        v_BGSK: Values of all tokens; their width may differ from K.
        prefix: Learned keys and values to prepend.

    Returns:
        The mixed values, ``(B, H, T, width of the values)``.
    """
    if prefix is not None:
        k_BGSK, v_BGSK = prefix(k_BGSK, v_BGSK)
    time, sources = q_BHTK.shape[-2], k_BGSK.shape[-2]
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    if time == sources:
        return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, is_causal=True, enable_gqa=grouped)
    # the query of token t attends to sources up to S - T + t
    seen_TS = torch.ones(time, sources, dtype=torch.bool, device=q_BHTK.device).tril(sources - time)
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=seen_TS, enable_gqa=grouped)


def rotary_table(context_length: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Tabulate the rotations of RoFormer, equation 15: angle t / 10000^(2 i / K) at time t for the i-th pair.

    Args:
        context_length: Number of positions, T.
        head_width: Width of a head, K.

    Returns:
        Cosines and sines, each of shape ``(T, K)``; pair i consists of elements i and i + K / 2.
    """
    wavelength_exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
    angles_TK = torch.outer(torch.arange(context_length, dtype=torch.float32), _ROTARY_BASE**-wavelength_exponents)
    angles_TK = torch.cat([angles_TK, angles_TK], dim=-1)
    return angles_TK.cos(), angles_TK.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate each pair of elements of every head by the angles of its position.

    Args:
        x_BHTK: Queries or keys.
        cos_TK: Cosines of :func:`rotary_table`.
        sin_TK: Sines of :func:`rotary_table`.

    Returns:
        The rotated queries or keys, in the dtype of ``x_BHTK``.
    """
    first, second = x_BHTK.chunk(2, dim=-1)
    return (x_BHTK * cos_TK + torch.cat([-second, first], dim=-1) * sin_TK).to(x_BHTK.dtype)
