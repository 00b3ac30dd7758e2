"""The dense feed-forward layer.

Dims in the suffixes of tensor names: B batch, T time, D model width, F inner width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202).

    Args:
        width: Model width, D.
        hidden: Inner width, F.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the update of the residual stream, of the shape of ``x_BTD``."""
        return self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))


def swiglu(gate: Tensor, up: Tensor) -> Any:
    """Return ``silu(gate) * up``; only the arguments are saved for the backward pass (DeepSeek-V3, section 3.3.3)."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gate, up = ctx.saved_tensors
        gradient, sigmoid = gradients[0], torch.sigmoid(gate)
        silu = gate * sigmoid
        slope = sigmoid + silu * (1 - sigmoid)  # d silu / d gate
        return gradient * up * slope, gradient * silu
