"""The dense feed-forward layer.

Dims in the suffixes of tensor names: B batch, T time, D model width, F width inside.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202).

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
