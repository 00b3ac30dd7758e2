"""Phases of a training run: settings, and the conditions for the next phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_hybrid.spec.checks import check_at_least, check_choices
from lightning_hybrid.spec.gradient_sync import GradientSync, SyncKind
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.renamed import renamed_arguments


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """A metric that has stopped decreasing."""

    metric: str
    """Name under which the metric is logged, such as `"train_loss"`."""
    every_n_steps: int = 100
    """Optimizer steps between two checks."""
    patience: int = 3
    """Consecutive checks without an improvement that make a plateau."""
    min_change: float = 0.01
    """Smallest improvement, as a share of the best value so far."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every_n_steps", "patience")
        if not 0 <= self.min_change < 1:
            raise ValueError(f"`min_change` must be between 0 and 1. Got {self.min_change}.")


@renamed_arguments(micro_batch_size="microbatch_size")
@dataclass(frozen=True, kw_only=True)
class Phase:
    """Settings from one point of training on; settings that are None keep their value.

    The first phase begins with the training, every other phase at the first of its `at_...` points.
    """

    at_step: int | None = None
    """Begins after this many optimizer steps."""
    at_samples: int | None = None
    """Begins after this many samples, summed over replicas."""
    at_tokens: int | None = None
    """Begins after this many tokens: elements of a batch's first tensor, summed over replicas."""
    at_plateau: Plateau | None = None
    """Begins when a metric has stopped improving in the previous phase."""
    layout: str | None = None
    """The layout, on all devices of the run."""
    schedule: Literal["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"] | None = None
    """The pipeline schedule."""
    microbatches: int | Literal["auto"] | None = None
    """Number of microbatches of a replica's batch under `pp`."""
    batch_size: int | None = None
    """Samples of the global batch, summed over replicas and accumulated batches."""
    microbatch_size: int | None = None
    """Upper limit of the samples in one forward pass."""
    sequence_length: int | None = None
    """Splits samples of T tokens into samples of this many tokens. 0: not split."""
    gradient_sync: SyncKind | GradientSync | None = None
    """Gradient synchronization of the replicas (see `HybridStrategy`)."""
    streams: int | None = None
    """Number of parallel streams (ParScale); calls the module's method `open_streams(streams)`."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "at_step", "at_samples", "at_tokens", "batch_size", "microbatch_size", "streams")
        check_at_least(self, 0, "sequence_length")
        if self.layout is not None:
            Layout.parse(self.layout)
        given = {name: getattr(self, name) for name in ("schedule", "microbatches") if getattr(self, name) is not None}
        check_choices(**{"schedule": "1F1B", "microbatches": "auto", "recompute": None} | given)
        if self.gradient_sync is not None:
            GradientSync.of(self.gradient_sync)

    @property
    def begins(self) -> bool:
        """True if the phase names a point at which it begins."""
        return any(p is not None for p in (self.at_step, self.at_samples, self.at_tokens, self.at_plateau))


def check_phases(phases: Sequence[Phase]) -> None:
    """Checks the order and the starting points of `phases`.

    Raises:
        ValueError: If the phases are not in order or have wrong starting points.
    """
    if not isinstance(phases, Sequence) or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"`phases` must be a list of `Phase`. Got {phases!r}.")
    if not phases:
        raise ValueError("`phases` must have at least one phase.")
    if phases[0].begins:
        raise ValueError("`phases`: the first phase begins with the training, so it must not say when.")
    for number, phase in enumerate(phases[1:], 1):
        if not phase.begins:
            raise ValueError(
                f"`phases`: phase {number} must say when it begins: `at_step`, `at_samples`, `at_tokens` or "
                "`at_plateau`."
            )
    for name in ("at_step", "at_samples", "at_tokens"):
        points = [p for phase in phases if (p := getattr(phase, name)) is not None]
        if points != sorted(set(points)):
            raise ValueError(f"`phases` must begin one after the other. Got `{name}` at {points}.")


def in_force(phases: Sequence[Phase]) -> Phase:
    """Returns the accumulated settings of `phases`: for each setting the last value that is not None."""
    settings: dict[str, Any] = {}
    for phase in phases:
        settings |= {k: v for k, v in vars(phase).items() if v is not None and not k.startswith("at_")}
    return Phase(**settings)


@dataclass(frozen=True, kw_only=True)
class PhaseState:
    """Progress through the phases; immutable, saved in checkpoints."""

    phase: int = 0
    """Index of the current phase."""
    samples: int = 0
    """Samples trained on."""
    tokens: int = 0
    """Tokens trained on, if they are counted."""
    best: float = math.inf
    """Best value, in this phase, of the metric of the next phase's plateau."""
    looks: int = 0
    """Consecutive checks without an improvement."""

    def after_step(self, samples: int, tokens: int) -> PhaseState:
        """Returns the state after one optimizer step."""
        return replace(self, samples=self.samples + samples, tokens=self.tokens + tokens)

    def seen(self, value: float, plateau: Plateau) -> PhaseState:
        """Returns the state after a check of the metric with this `value`."""
        if value < self.best - plateau.min_change * abs(self.best if math.isfinite(self.best) else value):
            return replace(self, best=value, looks=0)
        return replace(self, looks=self.looks + 1)

    def ends(self, following: Phase, steps: int) -> bool:
        """Returns True if `following` begins now, after `steps` optimizer steps."""
        reached = [
            following.at_step is not None and steps >= following.at_step,
            following.at_samples is not None and self.samples >= following.at_samples,
            following.at_tokens is not None and self.tokens >= following.at_tokens,
            following.at_plateau is not None and self.looks >= following.at_plateau.patience,
        ]
        return any(reached)

    def next(self) -> PhaseState:
        """Returns the state at the beginning of the next phase."""
        return replace(self, phase=self.phase + 1, best=math.inf, looks=0)
