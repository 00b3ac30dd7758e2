"""Root mean square normalisation with the epsilon of Llama and DeepSeek."""

from torch import nn

_EPSILON = 1e-6
"""As the released configurations of Llama and DeepSeek-V3 (`rms_norm_eps`)."""


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6) times a learned scale (Zhang and Sennrich, arXiv:1910.07467, equation 4).

    Args:
        width: Elements over which the mean is taken: the last dim.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_EPSILON)
