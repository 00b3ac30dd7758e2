"""The global batch size: a target from the gradient noise scale, changed by a factor after consecutive votes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lightning_hybrid.adapt.gradient_noise import NoiseScale
from lightning_hybrid.spec.checks import check_at_least

Statistics = Literal["norm", "time"]
LearningRateRule = Literal["auto", "sqrt", "adascale", "none"]


def norm_test(batch_size: int, noise_scale: float, tolerance: float) -> float:
    """B+ = B / (eta^2 (1 + B / phi)): the size at which the gradient variance is `tolerance` of its mean square.

    The fixed point is phi (1 / eta^2 - 1), and B+ / B is at most 1 / eta^2.

    Args:
        batch_size: B, in samples.
        noise_scale: phi, in samples.
        tolerance: eta^2: variance of the batch's gradient over its mean square, above 0 and below 1.

    Reference: Byrd et al., "Sample Size Selection in Optimization Methods for Machine Learning" (2012), equation 3.12:
    B+ = variance / (theta^2 |g|^2), their theta is our eta; the variance over the mean square of the batch's gradient
    is (S/B) / (S/B + G^2) = 1 / (1 + B / phi).
    """
    if noise_scale <= 0:
        return 0.0
    return batch_size / (tolerance * (1 + batch_size / noise_scale))


def time_optimal(noise_scale: float, fixed_seconds: float, seconds_per_sample: float) -> float:
    """B* = sqrt(phi alpha / beta): maximizes progress per second, 1 / ((1 + phi / B) (alpha + beta B)).

    Args:
        noise_scale: phi, in samples.
        fixed_seconds: alpha, the part of a step's time that does not depend on the batch.
        seconds_per_sample: beta, the step's time per sample.

    Reference: progress per step is 1 / (1 + phi / B): McCandlish et al. (2018), equation 2.7. Progress over time is the
    goodput of Qiao et al., "Pollux" (2021), section 3.
    """
    if seconds_per_sample <= 0:
        return math.inf
    return math.sqrt(noise_scale * max(fixed_seconds, 0.0) / seconds_per_sample)


def learning_rate_factor(rule: LearningRateRule, growth: float, noise: float, signal: float) -> float:
    """Returns the factor on the learning rate of the first batch size.

    Args:
        rule: `"sqrt"`, for Adam and similar optimizers: the square root of `growth` (Malladi et al., "On the SDEs and
            Scaling Rules for Adaptive Gradient Algorithms", 2022). `"adascale"`, for SGD:
            (S + G^2) / (S / growth + G^2) (Johnson et al., "AdaScale SGD", 2020, gain ratio of section 3). `"none"`: 1.
        growth: Batch size over the first batch size.
        noise: S, the variance of the gradient of one batch of the first size.
        signal: G^2, the squared norm of the true gradient.
    """
    if rule == "none":
        return 1.0
    if rule == "sqrt":
        return math.sqrt(growth)
    noise, signal = max(noise, 0.0), max(signal, 0.0)
    if noise + signal <= 0:
        return 1.0
    return (noise + signal) / (noise / growth + signal)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """A fit of step times alpha + beta B, from decaying sums over steps of different batch sizes."""

    count: float = 0.0
    """Weighted number of steps."""
    batches: float = 0.0
    """Sum of B."""
    squares: float = 0.0
    """Sum of B^2."""
    seconds: float = 0.0
    """Sum of step times."""
    products: float = 0.0
    """Sum of B times step time."""

    def updated(self, batch_size: int, seconds: float, half_life_steps: float) -> StepTimes:
        """Returns the sums with one more step."""
        keep = 0.5 ** (1 / half_life_steps)
        return StepTimes(
            count=keep * self.count + 1,
            batches=keep * self.batches + batch_size,
            squares=keep * self.squares + batch_size**2,
            seconds=keep * self.seconds + seconds,
            products=keep * self.products + batch_size * seconds,
        )

    def fit(self) -> tuple[float, float] | None:
        """Returns alpha in seconds and beta in seconds per sample; None until two batch sizes were measured."""
        spread = self.count * self.squares - self.batches**2
        if not self.count or spread <= 1e-6 * self.batches**2:
            return None
        slope = (self.count * self.products - self.batches * self.seconds) / spread
        return (self.seconds - slope * self.batches) / self.count, slope


@dataclass(frozen=True, kw_only=True)
class DecisionRules:
    """Thresholds and intervals of the decisions on the batch size."""

    every_n_steps: int = 20
    """Steps between two votes."""
    factor: int = 2
    """A change multiplies or divides the batch size by this."""
    grow_at: float = 1.35
    """Votes to grow if the target is at least this many times the current size. At 1.5 the batch stays below a third of
    the noise scale, and runs took a quarter longer for the same loss; at 1.2 the loss was worse."""
    grow_votes: int = 2
    """Consecutive votes after which the batch grows."""
    shrink_at: float = 2.5
    """Votes to shrink if the target is at most the current size divided by this."""
    shrink_votes: int = 3
    """Consecutive votes after which the batch shrinks."""
    half_life_steps: float = 100.0
    """Half-life of the averages of the statistics; 10 and 30 were worse on a regression with label noise."""
    measure_every_n_steps: int = 4
    """Steps between two measurements of the gradient noise, after the first `half_life_steps` steps, which are all
    measured. Measuring every step costs up to 5 % on a CPU."""
    tolerance: float = 0.5
    """eta^2 of the norm test; with 0.5 the target is the noise scale."""
    min_batch_size: int = 1
    """Lower limit of the global batch size."""

    def __post_init__(self) -> None:
        names = ("every_n_steps", "measure_every_n_steps", "grow_votes", "shrink_votes", "min_batch_size")
        check_at_least(self, 1, *names)
        check_at_least(self, 2, "factor")
        for name in ("grow_at", "shrink_at"):
            if getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be above 1. Got {getattr(self, name)}.")
        if not self.half_life_steps > 0:
            raise ValueError(f"`half_life_steps` must be above 0. Got {self.half_life_steps}.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"`tolerance` must be between 0 and 1. Got {self.tolerance}.")

    def steps_between(self, step: int) -> int:
        """Returns the number of steps between two measurements, at optimizer step `step`."""
        return 1 if step < self.half_life_steps else self.measure_every_n_steps

    def measures(self, step: int) -> bool:
        """Returns True if the gradient noise is measured in optimizer step `step`, counted from 0."""
        return step % self.steps_between(step) == 0


@dataclass(frozen=True, kw_only=True)
class Votes:
    """Consecutive votes for growing and for shrinking; a vote of one kind resets the other."""

    grow: int = 0
    """Consecutive votes to grow."""
    shrink: int = 0
    """Consecutive votes to shrink."""


def vote(batch_size: int, wanted: float, votes: Votes, rules: DecisionRules) -> tuple[int, Votes]:
    """Casts one vote, and changes the batch size if enough consecutive votes agree.

    Args:
        batch_size: The current global batch size.
        wanted: The target of the statistics.
        votes: Votes so far.
        rules: Thresholds and numbers of votes.

    Returns:
        The next batch size, usually the current one, and the updated votes.
    """
    if wanted >= rules.grow_at * batch_size:
        votes = Votes(grow=votes.grow + 1)
    elif wanted <= batch_size / rules.shrink_at:
        votes = Votes(shrink=votes.shrink + 1)
    else:
        return batch_size, Votes()
    if votes.grow >= rules.grow_votes:
        return batch_size * rules.factor, Votes()
    if votes.shrink >= rules.shrink_votes and batch_size % rules.factor == 0:
        return batch_size // rules.factor, Votes()
    return batch_size, votes


@dataclass(frozen=True, kw_only=True)
class BatchSizeState:
    """State of the decisions; equal on all ranks and saved in checkpoints."""

    batch_size: int
    """The current global batch size, in samples."""
    first_batch_size: int
    """The initial global batch size, for which the learning rate is given."""
    votes: Votes = Votes()
    """Votes since the last change."""
    steps: int = 0
    """Optimizer steps so far."""
    samples: int = 0
    """Samples consumed so far."""
    tokens: int = 0
    """Tokens consumed so far."""
    scheduled_samples: int = 0
    """Sum of the batch sizes of all steps; the position in learning rate schedules."""

    def after_step(self, samples: int, tokens: int) -> BatchSizeState:
        """Returns the state after one optimizer step on `samples` samples and `tokens` tokens."""
        return replace(
            self,
            steps=self.steps + 1,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            scheduled_samples=self.scheduled_samples + self.batch_size,
        )

    @property
    def growth(self) -> float:
        """The current batch size divided by the first."""
        return self.batch_size / self.first_batch_size


def wanted(
    statistics: Statistics, state: BatchSizeState, noise: NoiseScale, times: StepTimes, rules: DecisionRules
) -> float:
    """Returns the batch size that the statistics ask for; the current one without a measurement."""
    scale = noise.samples
    if scale is None:
        return state.batch_size
    if statistics == "norm":
        if math.isinf(scale):
            return state.batch_size / rules.tolerance
        return norm_test(state.batch_size, scale, rules.tolerance)
    fit = times.fit()
    if fit is None:  # times of a single size cannot predict a larger one: try one if the noise scale allows it
        return float(state.batch_size * rules.factor if scale >= state.batch_size else state.batch_size)
    return time_optimal(scale, *fit)
