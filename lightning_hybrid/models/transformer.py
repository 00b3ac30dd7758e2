"""A dense decoder-only transformer in the manner of Llama.

Dims in the suffixes of tensor names: B batch, T time (tokens of a window), D model width, H heads, K width of a head,
F width of the feed-forward layer, V vocabulary.

References:
    Touvron et al., LLaMA, arXiv:2302.13971 (the arrangement).
    Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    Su et al., RoFormer, arXiv:2104.09864 (rotary position embedding).
    Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202 (SwiGLU).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROTARY_BASE = 10_000.0
"""RoFormer, section 3.4.2: the base of the geometric series of wavelengths."""
_INITIAL_STD = 0.02
"""GPT-2 (Radford et al. 2019), section 2.3, as is that residual projections start smaller by sqrt(residual layers)."""


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding.

    Args:
        width: Model width, D.
        heads: Number of heads, H; D / H = K must be an even number.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Mix each position with those before it.

        Args:
            x_BTD: Normalised hidden states.
            cos_TK: Cosines of the rotation angles.
            sin_TK: Sines of the rotation angles.

        Returns:
            What is added to the residual stream, of the shape of ``x_BTD``.
        """
        q_BHTK = rotate(self._split_heads(self.q_proj(x_BTD)), cos_TK, sin_TK)
        k_BHTK = rotate(self._split_heads(self.k_proj(x_BTD)), cos_TK, sin_TK)
        v_BHTK = self._split_heads(self.v_proj(x_BTD))
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.out_proj(mixed_BHTK.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``.

    Args:
        width: Model width, D.
        hidden: Width inside, F.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return what is added to the residual stream, of the shape of ``x_BTD``."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """Attention and a feed-forward layer, each on normalised input and added to the residual stream.

    Args:
        width: Model width, D.
        heads: Number of heads, H.
        hidden: Width inside the feed-forward layer, F.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Return the residual stream after the block, of the shape of ``x_BTD``."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TK, sin_TK)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class Transformer(nn.Module):
    """Embedding, a stack of blocks, a final norm and a head.

    Args:
        vocabulary: Number of token values, V.
        width: Model width, D.
        blocks: Number of blocks.
        heads: Number of heads, H, in each block.
        context_length: The longest sequence, in tokens.

    Raises:
        ValueError: If the width can't be split into heads of an even width.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, vocabulary: int, width: int, blocks: int, heads: int, context_length: int) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(
                f"`width` must be a multiple of 2 * `heads`, so that each head has an even width to rotate. "
                f"Got width {width} with {heads} heads. Use {max(1, round(width / (2 * heads))) * 2 * heads}."
            )
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, feed_forward_width(width)) for _ in range(blocks))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        cos_TK, sin_TK = rotary_table(context_length, width // heads)
        self.register_buffer("rotary_cos", cos_TK, persistent=False)
        self.register_buffer("rotary_sin", sin_TK, persistent=False)
        self._initialize(blocks)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Predict the token after each position.

        Args:
            tokens_BT: Token values, at most ``context_length`` in a row.

        Returns:
            Unnormalised log-probabilities, ``logits_BTV``.
        """
        time = tokens_BT.shape[1]
        cos_TK, sin_TK = self.rotary_cos[:time], self.rotary_sin[:time]
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TK, sin_TK)
        return self.head(self.norm(x_BTD))

    def _initialize(self, blocks: int) -> None:
        # Two layers of each block write to the residual stream; its variance must not grow with depth.
        residual_std = _INITIAL_STD / math.sqrt(2 * blocks)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("out_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if residual else _INITIAL_STD)


def feed_forward_width(width: int) -> int:
    """Return F for a model width D: 8/3 D, so that three matrices cost what two of 4 D do, in multiples of 32."""
    return math.ceil(8 * width / 3 / 32) * 32


def rotary_table(context_length: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Tabulate the rotations of RoFormer, equation 15: angle t / 10000^(2 i / K) at time t for the i-th pair.

    Args:
        context_length: Number of positions, T.
        head_width: Width of a head, K.

    Returns:
        The cosines and the sines, each of shape ``(T, K)``; pair i is the elements i and i + K / 2.
    """
    wavelength_exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
    angles_TK = torch.outer(torch.arange(context_length, dtype=torch.float32), _ROTARY_BASE**-wavelength_exponents)
    angles_TK = torch.cat([angles_TK, angles_TK], dim=-1)
    return angles_TK.cos(), angles_TK.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate each pair of elements of every head by its position's angles.

    Args:
        x_BHTK: Queries or keys.
        cos_TK: Cosines of :func:`rotary_table`.
        sin_TK: Sines of :func:`rotary_table`.

    Returns:
        The rotated queries or keys, in their own dtype.
    """
    first, second = x_BHTK.chunk(2, dim=-1)
    return (x_BHTK * cos_TK + torch.cat([-second, first], dim=-1) * sin_TK).to(x_BHTK.dtype)
