"""Multi-token prediction: in training, each position also predicts tokens after the next one.

Dims in the suffixes of tensor names: B batch, T time, D model width.

Reference:
    DeepSeek-V3, arXiv:2412.19437, section 2.2, whose equations are cited.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_hybrid.models.norm import RMSNorm


class FurtherToken(nn.Module):
    """One prediction depth. Embedding and head are shared with the main model.

    Args:
        width: Model width, D.
        block: The transformer block T_k; returns the residual stream and the balance losses.
    """

    def __init__(self, width: int, block: nn.Module) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(width)
        self.token_norm = RMSNorm(width)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.block = block
        self.final_norm = RMSNorm(width)

    def forward(
        self, x_BTD: Tensor, token_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, balance: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Combine the hidden states of the previous depth with one more token.

        Args:
            x_BTD: The residual stream of the previous depth, h^(k-1).
            token_BTD: Embedding of the token k positions later.
            cos_TR: Cosines of the rotation angles.
            sin_TR: Sines of the rotation angles.
            balance: Sum of the balance losses so far.

        Returns:
            The residual stream h^k, equation 22, for ``final_norm`` and the shared head; and the balance losses
            including those of this block.
        """
        both_BTD = torch.cat([self.hidden_norm(x_BTD), self.token_norm(token_BTD)], dim=-1)
        return self.block(self.projection(both_BTD), cos_TR, sin_TR, None, balance)  # equations 21 and 22
