"""What may be refused, and why: the table that docs/support.md is made from."""

from __future__ import annotations

from tests.zoo.run import Combination

REFUSALS: dict[tuple[str, str], str] = {
    ("albert", "pp"): "one block is called for every layer",
}
"""(case, axis of the layout): pattern that the PartitionError's text must contain."""


def expected_refusal(name: str, combination: Combination) -> str | None:
    """Pattern of the refusal's text, or None where the result must be exact."""
    for (case, axis), pattern in REFUSALS.items():
        if case == name and axis in combination.axes:
            return pattern
    return None
