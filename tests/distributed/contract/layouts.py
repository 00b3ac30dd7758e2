"""What the contract tests share: the layouts, and comparison with one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hybrid import Layout
from tests.harness import RankGroup

TWO = ["dp2", "fsdp2", "tp2", "pp2"]
FOUR = ["dp2-pp2", "fsdp2-tp2"]
LAYOUTS = [*TWO, "dp2-pp2", pytest.param("fsdp2-tp2", marks=pytest.mark.slow)]


def call(request: pytest.FixtureRequest, layout: str, job: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Runs `job(layout, ...)` on as many ranks as the layout has."""
    ranks: RankGroup = request.getfixturevalue("ranks2" if Layout.parse(layout.split()[0]).devices == 2 else "ranks4")
    return ranks.call(job, layout, *args, **kwargs)


def assert_equal(found: Any, expected: Any, path: str = "", tolerance: float = 1e-5) -> None:
    """Equal structures with numbers equal within a relative tolerance."""
    if isinstance(expected, dict):
        assert sorted(found) == sorted(expected), path
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}[{key!r}]", tolerance)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), f"{path}: {found} {expected}"
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_equal(a, b, f"{path}[{i}]", tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-6), path
    else:
        assert found == expected, path


def assert_same_weights(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Equal names, in the same order, and values."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=1e-6, msg=name)
