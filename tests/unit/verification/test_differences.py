"""Differences of weights that a step has written."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_hybrid.verification.differences import of_written

BEFORE = torch.tensor([3.0, 4.0])


def _with(value: float) -> torch.Tensor:
    return torch.tensor([3.0, value])


def test_a_difference_is_relative_to_the_write() -> None:
    assert of_written(BEFORE, BEFORE + 1.0, BEFORE) == pytest.approx(1.0)
    assert of_written(BEFORE + 0.5, BEFORE + 1.0, BEFORE) == pytest.approx(0.5)
    assert of_written(BEFORE + 1e-7, BEFORE, BEFORE) < 1e-4  # rounding of the weight


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [(math.nan, 4.0, math.inf), (4.0, math.nan, math.inf), (math.inf, 4.0, math.inf), (math.nan, math.nan, 0.0)],
)
def test_values_that_are_not_finite(found: float, expected: float, difference: float) -> None:
    assert of_written(_with(found), _with(expected), BEFORE) == difference


def test_a_weight_that_was_not_finite_is_compared() -> None:
    assert of_written(_with(5.0), _with(4.0), _with(math.nan)) == pytest.approx(0.2)
