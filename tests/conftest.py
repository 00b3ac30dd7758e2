"""Fixtures shared by all tests: groups of ranks that are started once, and single-process references."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.harness import RankGroup


def _ranks(world_size: int) -> Iterator[RankGroup]:
    group = RankGroup(world_size)
    yield group
    pids = group.pids
    group.close()
    left = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    assert not left, f"ranks left running: {left}"


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankGroup]:
    """Two gloo ranks, started at the first call."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankGroup]:
    """Four gloo ranks, started at the first call."""
    yield from _ranks(4)


@pytest.fixture(scope="session")
def ranks8() -> Iterator[RankGroup]:
    """Eight gloo ranks, started at the first call."""
    yield from _ranks(8)
