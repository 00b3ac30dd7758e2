"""Fixtures shared by all tests: groups of ranks that are started once, and single-process references."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import harness, support
from tests.harness import RankGroup

TESTS = Path(__file__).parent
TIERS = {
    "unit": "unit",
    "distributed": "distributed",
    "faults": "distributed",
    "recipes": "recipes",
    "gpu": "gpu",
}
"""The mark of all tests in a folder; a folder that is not here has tests of several tiers, which carry their marks."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--support-table` and `--list-features`."""
    parser.addoption("--support-table", metavar="FILE", help="write what the tests show into the table of this file")
    parser.addoption("--list-features", action="store_true", help="say what the collected tests show")


def pytest_configure(config: pytest.Config) -> None:
    """Collects for the table, if there is to be one; ranks get the filters of warnings."""
    harness.warning_filters[:] = config.getini("filterwarnings")
    if config.getoption("--support-table"):
        config.pluginmanager.register(support.SupportTable(), "support table")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each test the mark of its folder, unless the test names its tier."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        tier = TIERS.get(folder)
        if tier is not None and not any(item.get_closest_marker(name) for name in TIERS.values()):
            item.add_marker(tier)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Lists what the tests show, if that was asked for."""
    if session.config.getoption("--list-features"):
        features = dict.fromkeys(
            f for item in session.items if support.layout_of(item) for f in support.features_of(item)
        )
        sys.stdout.write("".join(f"feature: {feature}\n" for feature in features))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes it."""
    table = session.config.pluginmanager.get_plugin("support table")
    if table is not None:
        support.write(Path(str(session.config.getoption("--support-table"))), table.rows())


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """Destroys the process group that a strategy leaves: Lightning would take a later run for one of several ranks."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


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
