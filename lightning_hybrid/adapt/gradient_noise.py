"""The gradient noise scale, estimated from the gradients of parts of a batch.

With g the gradient of the whole batch of B samples and g_k those of its K parts of b = B / K samples each,
s = mean |g_k|^2 and q = |g|^2, unbiased estimates (`PartNorms.estimate`) are

    S   = (s - q) / (1/b - 1/B)        the trace of the covariance of one sample's gradient
    G^2 = (B q - b s) / (B - b)        the squared norm of the true gradient

and S / G^2 is the noise scale (`NoiseScale.samples`): the batch size at which the variance of the gradient equals its
squared norm.

Reference: McCandlish et al., "An Empirical Model of Large-Batch Training" (2018), appendix A.1; their |G_small|^2 is
our s, their |G_big|^2 our q.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class PartNorms:
    """Squared gradient norms of a group of parameters whose gradients have the same parts."""

    parts: int
    """K, the number of parts of the batch with separate gradients."""
    mean_of_squares: float
    """s, the mean of the parts' squared norms."""
    square_of_mean: float
    """q, the squared norm of the whole batch's gradient."""

    def estimate(self, batch_size: int) -> tuple[float, float]:
        """Returns S and G^2 of these parameters.

        Args:
            batch_size: B, in samples.

        Returns:
            S and G^2; zeros if there is only one part.
        """
        if self.parts < 2:
            return 0.0, 0.0
        part = batch_size / self.parts
        noise = (self.mean_of_squares - self.square_of_mean) / (1 / part - 1 / batch_size)
        signal = (batch_size * self.square_of_mean - part * self.mean_of_squares) / (batch_size - part)
        return noise, signal


def estimate(groups: Iterable[PartNorms], batch_size: int) -> tuple[float, float]:
    """Returns S and G^2, summed over groups of parameters with different parts: both are additive."""
    noise = signal = 0.0
    for group in groups:
        s, g = group.estimate(batch_size)
        noise, signal = noise + s, signal + g
    return noise, signal


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """Exponential moving averages of S and of G^2; not of their quotient, whose mean is biased."""

    half_life_steps: float = 100.0
    """Steps after which the weight of an estimate has halved."""
    noise_sum: float = 0.0
    """Weighted sum of S; divided by `weight` it is the average."""
    signal_sum: float = 0.0
    """Weighted sum of G^2."""
    weight: float = 0.0
    """Sum of the weights, which corrects for the start at zero."""

    def __post_init__(self) -> None:
        if not self.half_life_steps > 0:
            raise ValueError(f"`half_life_steps` must be above 0. Got {self.half_life_steps}.")

    def updated(self, noise: float, signal: float, steps: int = 1) -> NoiseScale:
        """Returns the averages with one more estimate, `steps` after the last; ignores non-finite estimates."""
        if not (math.isfinite(noise) and math.isfinite(signal)):
            return self
        keep = 0.5 ** (steps / self.half_life_steps)
        return replace(
            self,
            noise_sum=keep * self.noise_sum + (1 - keep) * noise,
            signal_sum=keep * self.signal_sum + (1 - keep) * signal,
            weight=keep * self.weight + (1 - keep),
        )

    @property
    def noise(self) -> float:
        """The average of S; 0 before the first step."""
        return self.noise_sum / self.weight if self.weight else 0.0

    @property
    def signal(self) -> float:
        """The average of G^2; 0 before the first step."""
        return self.signal_sum / self.weight if self.weight else 0.0

    @property
    def samples(self) -> float | None:
        """The noise scale in samples; infinite if the estimate of G^2 is not positive; None before the first step."""
        if not self.weight:
            return None
        if self.signal <= 0:
            return math.inf
        return max(self.noise, 0.0) / self.signal
