"""Parallel streams (ParScale): one set of weights runs P times, with different learned prefixes; outputs are combined.

Dims in the suffixes of tensor names: B batch, T time, D model width, P streams.

Reference:
    Chen et al., Parallel Scaling Law for Language Models, arXiv:2505.10475, section 3.1 (prefixes, aggregation) and
    section 3.2 (smoothing).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hybrid.models.config import StreamsConfig


class StreamAggregator(nn.Module):
    """Weighted mean of the streams, with weights per position computed by a small network.

    Args:
        config: Configuration of the streams.
        width: Model width, D.
        std: Standard deviation of the initial weights.
    """

    def __init__(self, config: StreamsConfig, width: int, std: float) -> None:
        super().__init__()
        self.config = config
        self.inner = nn.Linear(config.count * width, width)
        self.outer = nn.Linear(width, config.count)
        for linear in (self.inner, self.outer):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Combine the streams.

        Args:
            x_BTD: Normalized hidden states, ordered by stream along the batch: ``(P * B, T, D)``.

        Returns:
            Combined hidden states, ``(B, T, D)``.
        """
        x_PBTD = x_BTD.unflatten(0, (self.config.count, -1))
        together_BTD = x_PBTD.movedim(0, -2).flatten(-2)
        weights_BTP = self.outer(F.silu(self.inner(together_BTD))).float().softmax(dim=-1)
        epsilon = self.config.smoothing
        weights_BTP = weights_BTP * (1 - epsilon) + epsilon / self.config.count
        return (x_PBTD * weights_BTP.movedim(-1, 0)[..., None].to(x_BTD.dtype)).sum(dim=0)
