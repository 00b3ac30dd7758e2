"""Choice of the combinations of options that run always; the others are marked slow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


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
        found.append(pytest.param(*(value for _, value in combination), marks=[] if first else pytest.mark.slow))
    return found
