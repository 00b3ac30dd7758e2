"""When a better balance pays for the move, and what is done if it does not come."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_hybrid.spec.checks import check_at_least


@dataclass(frozen=True, kw_only=True)
class RebalancingRules:
    """How readily load is moved."""

    every_n_steps: int = 20
    """Steps between two looks; times are medians over them."""
    min_gain: float = 0.05
    """A move must be predicted to shorten the step by at least this share."""
    votes: int = 2
    """So many looks in a row must say so."""
    rest_looks: int = 2
    """Looks after a move in which nothing is moved, and of which the last one judges it."""
    kept_share: float = 0.3
    """A move must bring at least this share of the gain that was predicted, or it is taken back."""
    horizon_steps: int = 1000
    """Steps that are left, where the Trainer has no end."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every_n_steps", "votes", "rest_looks", "horizon_steps")
        for name in ("min_gain", "kept_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be between 0 and 1. Got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a kind of balance has come to; a value, so that it can be saved."""

    votes: int = 0
    """Looks in a row that wanted a move."""
    rest: int = 0
    """Looks until the last move is judged."""
    before_seconds: float = 0.0
    """Of a step before it, or whatever else it is judged by."""
    gain: float = 0.0
    """What was predicted of it, as a share."""
    failed: int = 0
    """Moves that were taken back; each doubles the gain that the next one must have."""


def pays(gain_seconds: float, steps_left: int, move_seconds: float) -> bool:
    """Whether a gain in each of the steps that are left is more than a move takes."""
    return steps_left * gain_seconds > move_seconds


def look(
    watch: Watch, gain: float, step_seconds: float, steps_left: int, move_seconds: float, rules: RebalancingRules
) -> tuple[bool, Watch]:
    """Whether to move now.

    Args:
        watch: The state so far, not at rest.
        gain: By what share a step would become shorter.
        step_seconds: Of a step at present.
        steps_left: Of the run.
        move_seconds: What the last move took, or is thought to take.
        rules: How readily.
    """
    wanted = gain >= rules.min_gain * 2**watch.failed and pays(gain * step_seconds, steps_left, move_seconds)
    votes = watch.votes + 1 if wanted else 0
    if votes < rules.votes:
        return False, replace(watch, votes=votes)
    return True, replace(watch, votes=0, rest=rules.rest_looks, before_seconds=step_seconds, gain=gain)


def judge(watch: Watch, step_seconds: float, rules: RebalancingRules) -> tuple[bool, Watch]:
    """One look after a move: whether to take it back.

    Args:
        watch: The state, at rest.
        step_seconds: Of a step since the last look.
        rules: How readily.
    """
    watch = replace(watch, rest=watch.rest - 1)
    if watch.rest > 0:
        return False, watch
    gained = 1 - step_seconds / watch.before_seconds
    if gained >= rules.kept_share * watch.gain:
        return False, watch
    return True, replace(watch, failed=watch.failed + 1)
