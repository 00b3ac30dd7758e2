"""Choice of the parameters of a test that run always; the others are marked slow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Returns the parameters of a test as one that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def quick(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Returns `values` as parameters of a test; those that are not in `kept` are slow."""
    values = list(values)
    if unknown := [value for value in kept if value not in values]:
        raise ValueError(f"`kept` must be among the values. Got {unknown}.")
    return [value if value in kept else slow(*(value if isinstance(value, tuple) else (value,))) for value in values]


def alternating(first: Iterable[Any], second: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Returns every other pair of values, as on a chessboard: each value with half of the other option's."""
    pairs = itertools.product(enumerate(first), enumerate(second))
    return [(a, b) for (i, a), (j, b) in pairs if (i + j) % 2 == 0]


def pairwise(*options: Sequence[Any]) -> list[Any]:
    """Returns all combinations of the values of options, as parameters of a test.

    Those that are not slow have every combination of the values of all options but any one: of three options every
    pair of values, of two options every value.

    Args:
        *options: The values of each option; the last one must not have more values than any other.
    """
    found = []
    for combination in itertools.product(*(enumerate(values) for values in options)):
        first = sum(index for index, _ in combination) % len(options[-1]) == 0
        values = tuple(value for _, value in combination)
        found.append(pytest.param(*values) if first else slow(*values))
    return found
