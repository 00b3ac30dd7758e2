"""Decides when a predicted gain justifies a move of load, and when a move is reverted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_hybrid.spec.checks import check_at_least


@dataclass(frozen=True, kw_only=True)
class RebalancingRules:
    """Thresholds and intervals of the decisions on moves."""

    every_n_steps: int = 20
    """Steps between two checks; times are medians over these steps."""
    min_gain: float = 0.05
    """A move must be predicted to shorten the step by at least this share."""
    votes: int = 2
    """Consecutive checks that must predict it."""
    rest_looks: int = 2
    """Checks after a move without another move; the last of them measures the gain."""
    kept_share: float = 0.3
    """A move whose measured gain is below this share of the predicted gain is reverted."""
    horizon_steps: int = 1000
    """Assumed remaining steps if the Trainer has no limit."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every_n_steps", "votes", "rest_looks", "horizon_steps")
        for name in ("min_gain", "kept_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be between 0 and 1. Got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """State of the decisions on one kind of load; immutable, saved in checkpoints."""

    votes: int = 0
    """Consecutive checks that voted for a move."""
    rest: int = 0
    """Checks until the last move is judged."""
    before_seconds: float = 0.0
    """Step time before the last move, in seconds, or another cost by which the move is judged."""
    gain: float = 0.0
    """Predicted gain of the last move, as a share of the step time."""
    failed: int = 0
    """Number of reverted moves; each doubles the gain that the next move must promise."""


def pays(gain_seconds: float, steps_left: int, move_seconds: float) -> bool:
    """Returns True if the gain over all remaining steps exceeds the cost of a move."""
    return steps_left * gain_seconds > move_seconds


def look(
    watch: Watch, gain: float, step_seconds: float, steps_left: int, move_seconds: float, rules: RebalancingRules
) -> tuple[bool, Watch]:
    """Checks whether to move now.

    Args:
        watch: The state so far, with `rest` 0.
        gain: Predicted gain, as a share of the step time.
        step_seconds: Current step time.
        steps_left: Remaining steps of the run.
        move_seconds: Measured cost of the last move, or an assumed cost.
        rules: Thresholds.

    Returns:
        True if the move should be made, and the new state.
    """
    wanted = gain >= rules.min_gain * 2**watch.failed and pays(gain * step_seconds, steps_left, move_seconds)
    votes = watch.votes + 1 if wanted else 0
    if votes < rules.votes:
        return False, replace(watch, votes=votes)
    return True, replace(watch, votes=0, rest=rules.rest_looks, before_seconds=step_seconds, gain=gain)


def judge(watch: Watch, step_seconds: float, rules: RebalancingRules) -> tuple[bool, Watch]:
    """Checks a move that was made, and decides whether to revert it.

    Args:
        watch: The state, with `rest` above 0.
        step_seconds: Step time since the last check.
        rules: Thresholds.

    Returns:
        True if the move should be reverted, and the new state.
    """
    watch = replace(watch, rest=watch.rest - 1)
    if watch.rest > 0:
        return False, watch
    gained = 1 - step_seconds / watch.before_seconds
    if gained >= rules.kept_share * watch.gain:
        return False, watch
    return True, replace(watch, failed=watch.failed + 1)
