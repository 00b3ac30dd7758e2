"""Root mean square normalization with the epsilon of Llama and DeepSeek."""

from torch import nn

_EPSILON = 1e-6
"""As in the released configurations of Llama and DeepSeek-V3 (`rms_norm_eps`)."""


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6) times a learned scale (Zhang and Sennrich, arXiv:1910.07467, equation 4).

    Args:
        width: Size of the last dim, over which the mean is taken.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_EPSILON)
