"""Multi-head latent attention: keys and values of all heads are projected from one small latent per token.

The cache holds C + R numbers per token instead of 2 H K. Dims in the suffixes of tensor names: B batch, T time, S
sources, D model width, H heads, C latent of keys and values, R rotary width, K width of a head without its rotary part.

References:
    DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437, section 2.1.1, whose equations are
    cited. Our D, K, C, R are their d, d_h, d_c, d_h^R.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_hybrid.models.attention import Cache, Prefix, attend, rotate
from lightning_hybrid.models.config import LatentConfig
from lightning_hybrid.models.norm import RMSNorm


class LatentAttention(nn.Module):
    """Causal self-attention with latent queries, keys and values.

    Args:
        width: Model width, D.
        heads: Number of heads, H.
        config: Widths of the latents and of the parts of a head.
    """

    prefix: Prefix | None

    def __init__(self, width: int, heads: int, config: LatentConfig) -> None:
        super().__init__()
        self.heads, self.config = heads, config
        query = config.head + config.rotary
        if config.query is None:
            self.q_proj = nn.Linear(width, heads * query, bias=False)
        else:
            self.q_down_proj = nn.Linear(width, config.query, bias=False)
            self.q_norm = RMSNorm(config.query)
            self.q_up_proj = nn.Linear(config.query, heads * query, bias=False)
        self.kv_down_proj = nn.Linear(width, config.key_value + config.rotary, bias=False)
        self.kv_norm = RMSNorm(config.key_value)
        self.kv_up_proj = nn.Linear(config.key_value, heads * (config.head + config.value), bias=False)
        self.out_proj = nn.Linear(heads * config.value, width, bias=False)
        self.register_module("prefix", None)

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: Cache | None = None) -> Tensor:
        """Mix each position with those before it.

        Args:
            x_BTD: Normalized hidden states.
            cos_TR: Cosines of the rotation angles.
            sin_TR: Sines of the rotation angles.
            cache: Latents and rotary keys of previous tokens; extended by these tokens.

        Returns:
            The update of the residual stream, of the shape of ``x_BTD``.
        """
        config = self.config
        q_BHTK, q_BHTR = self._queries(x_BTD).split([config.head, config.rotary], dim=-1)
        q_BHTR = rotate(q_BHTR, cos_TR, sin_TR)  # equation 8
        latent_BTC, k_BTR = self.kv_down_proj(x_BTD).split([config.key_value, config.rotary], dim=-1)  # equation 1
        latent_BSC = self.kv_norm(latent_BTC)
        k_BSR = rotate(k_BTR[:, None], cos_TR, sin_TR)[:, 0]  # equation 3
        if cache is not None:
            latent_BSC, k_BSR = cache.extend(self, latent_BSC, k_BSR)
        up_BHSK = self.kv_up_proj(latent_BSC).unflatten(-1, (-1, config.head + config.value)).transpose(1, 2)
        k_BHSK, v_BHSK = up_BHSK.split([config.head, config.value], dim=-1)  # equations 2 and 5
        k_BHSR = k_BSR[:, None].expand(-1, k_BHSK.shape[1], -1, -1)
        # equations 4, 9 and 10; attention divides by the square root of K + R, the width of its queries
        q, k = torch.cat([q_BHTK, q_BHTR], dim=-1), torch.cat([k_BHSK, k_BHSR], dim=-1)
        mixed_BHTK = attend(q, k, v_BHSK, self.prefix)
        return self.out_proj(mixed_BHTK.transpose(1, 2).flatten(2))  # equation 11

    def open_prefix(self, streams: int, length: int, std: float) -> None:
        """Adds learned keys and values for each stream."""
        config = self.config
        self.prefix = Prefix(streams, length, self.heads, config.head + config.rotary, config.value, std)

    def _queries(self, x_BTD: Tensor) -> Tensor:
        """Return the queries of all heads, equations 6 to 9; the part to be rotated comes last."""
        if self.config.query is None:
            q_BTD = self.q_proj(x_BTD)
        else:
            q_BTD = self.q_up_proj(self.q_norm(self.q_down_proj(x_BTD)))
        return q_BTD.unflatten(-1, (-1, self.config.head + self.config.rotary)).transpose(1, 2)
