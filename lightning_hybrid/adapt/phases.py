"""Phases of a training: when one ends, and what the next one sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_hybrid.spec.checks import check_at_least
from lightning_hybrid.spec.gradient_sync import GradientSync, SyncKind


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """A metric that does not become smaller any more."""

    metric: str
    """As it is logged, such as `"train_loss"`."""
    every_n_steps: int = 100
    """Optimizer steps between two looks."""
    patience: int = 3
    """So many looks in a row without an improvement are a plateau."""
    min_change: float = 0.01
    """An improvement is at least this share of the best value so far."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every_n_steps", "patience")
        if not 0 <= self.min_change < 1:
            raise ValueError(f"`min_change` must be between 0 and 1. Got {self.min_change}.")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What holds from a point of a training on; what is None stays as it was.

    The first phase begins with the training, each other one at the first of the points that it names.
    """

    at_step: int | None = None
    """It begins after so many steps of the optimizer."""
    at_samples: int | None = None
    """It begins once so many samples have been trained on, of all replicas."""
    at_tokens: int | None = None
    """It begins once so many tokens have been trained on: elements of a batch's first tensor."""
    at_plateau: Plateau | None = None
    """It begins when a metric has stopped to improve in the phase before."""
    layout: str | None = None
    """The layout, of all devices of the run."""
    schedule: Literal["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"] | None = None
    """The pipeline schedule."""
    microbatches: int | Literal["auto"] | None = None
    """Microbatches of a replica's batch under `pp`."""
    batch_size: int | None = None
    """Samples of the global batch, of all replicas and accumulated batches together."""
    micro_batch_size: int | None = None
    """No more samples are run at once."""
    sequence_length: int | None = None
    """Samples of T tokens are split into T / this many samples. 0: they are whole again."""
    gradient_sync: SyncKind | GradientSync | None = None
    """How replicas agree on gradients (see `HybridStrategy`)."""
    streams: int | None = None
    """Parallel streams that the module opens, by its method `open_streams(streams)`."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "at_step", "at_samples", "at_tokens", "batch_size", "micro_batch_size", "streams")
        check_at_least(self, 0, "sequence_length")

    @property
    def begins(self) -> bool:
        """Whether it says when it begins."""
        return any(p is not None for p in (self.at_step, self.at_samples, self.at_tokens, self.at_plateau))


def check_phases(phases: Sequence[Phase]) -> None:
    """Whether these can be the phases of a training.

    Raises:
        ValueError: If not.
    """
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
    """What holds after these phases: of each setting the one that was made last."""
    settings: dict[str, Any] = {}
    for phase in phases:
        settings |= {k: v for k, v in vars(phase).items() if v is not None and not k.startswith("at_")}
    return Phase(**settings)


@dataclass(frozen=True, kw_only=True)
class PhaseState:
    """Where a training is; a value, so that it can be saved."""

    phase: int = 0
    """Number of the phase that holds."""
    samples: int = 0
    """Trained on."""
    tokens: int = 0
    """Trained on, where they are counted."""
    best: float = math.inf
    """Of the metric of the next phase's plateau, in this phase."""
    looks: int = 0
    """In a row without an improvement."""

    def after_step(self, samples: int, tokens: int) -> PhaseState:
        """One step of the optimizer later."""
        return replace(self, samples=self.samples + samples, tokens=self.tokens + tokens)

    def seen(self, value: float, plateau: Plateau) -> PhaseState:
        """After a look at the metric."""
        if value < self.best - plateau.min_change * abs(self.best if math.isfinite(self.best) else value):
            return replace(self, best=value, looks=0)
        return replace(self, looks=self.looks + 1)

    def ends(self, following: Phase, steps: int) -> bool:
        """Whether `following` begins now, after `steps` steps of the optimizer."""
        reached = [
            following.at_step is not None and steps >= following.at_step,
            following.at_samples is not None and self.samples >= following.at_samples,
            following.at_tokens is not None and self.tokens >= following.at_tokens,
            following.at_plateau is not None and self.looks >= following.at_plateau.patience,
        ]
        return any(reached)

    def next(self) -> PhaseState:
        """At the beginning of the next phase."""
        return replace(self, phase=self.phase + 1, best=math.inf, looks=0)
