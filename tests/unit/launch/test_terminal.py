"""Long operations are announced once; what Lightning repeats on every rank is hidden."""

from __future__ import annotations

import logging
import time

import pytest
from lightning.fabric.utilities import distributed, seed

from lightning_hybrid.launch.terminal import hide_repetitions, lightning_is_quiet, told_if_long


def test_long_operations_are_announced(capsys: pytest.CaptureFixture) -> None:
    with told_if_long("Planning", after_seconds=0.01):
        time.sleep(0.2)
    with told_if_long("Saving"):
        pass
    first, last = capsys.readouterr().err.splitlines()
    assert first == "Planning ..."
    assert last == "Planning: 0 s"


def test_a_failed_operation_ends_with_its_error(capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        with told_if_long("Planning", after_seconds=0.01):
            time.sleep(0.2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().err == "Planning ...\n"


def test_logs_of_every_rank_are_hidden(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(distributed.__name__)
    before = logger.level
    with caplog.at_level(logging.INFO, distributed.__name__), lightning_is_quiet():
        distributed.log.info("Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2")
    assert not caplog.records
    assert logger.level == before


def test_seeds_of_other_ranks_are_hidden(caplog: pytest.LogCaptureFixture) -> None:
    filters = list(seed.log.filters)
    hide_repetitions()
    try:
        with caplog.at_level(logging.INFO, seed.__name__):
            seed.log.info("Seed set to 0")
            seed.log.info("[rank: 1] Seed set to 0")
    finally:
        seed.log.filters[:] = filters
    assert [record.getMessage() for record in caplog.records] == ["Seed set to 0"]
