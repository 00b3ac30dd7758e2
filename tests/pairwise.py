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


def in_turn(first: Iterable[Any], second: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Returns each value of the longer option once, with the values of the other one in turn."""
    first, second = list(first), list(second)
    return [(first[i % len(first)], second[i % len(second)]) for i in range(max(len(first), len(second)))]


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
