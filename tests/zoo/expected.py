"""What may be refused, and why: the table that docs/support.md is made from."""

from __future__ import annotations

from tests.zoo.run import Combination

FOUR_STAGES = ("Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")
"""Schedules with two stages a rank."""

REFUSALS: dict[tuple[str, str], str] = {
    (case, schedule): rf"needs 4 pipeline stages, but the model has only {has}"
    for case, has in (("lstm", "3 modules"), ("squeezebert", "3 modules"), ("swin", "2 blocks"))
    for schedule in FOUR_STAGES
}
"""(case, axis of the layout or schedule): pattern that the PartitionError's text must contain."""


def expected_refusal(name: str, combination: Combination) -> str | None:
    """Pattern of the refusal's text, or None where the result must be exact."""
    for (case, what), pattern in REFUSALS.items():
        if case == name and (what in combination.axes or ("pp" in combination.axes and what == combination.schedule)):
            return pattern
    return None
