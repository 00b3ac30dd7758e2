"""Long operations are announced once; what Lightning repeats on every rank is hidden."""

from __future__ import annotations

import logging
import time

import pytest
from lightning.fabric.utilities import distributed, rank_zero, seed
from lightning.pytorch.callbacks import early_stopping
from lightning.pytorch.trainer.connectors import checkpoint_connector

import lightning_hybrid  # noqa: F401 -- hides messages
from lightning_hybrid.launch.terminal import lightning_is_quiet, told_if_long


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


@pytest.mark.parametrize("rank", [0, 1])
def test_messages_of_other_ranks_are_hidden(
    rank: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero.rank_zero_only, "rank", rank)
    modules = (seed, early_stopping, checkpoint_connector)
    with caplog.at_level(logging.INFO):
        for module in modules:
            logger = logging.getLogger(module.__name__)
            monkeypatch.setattr(logger, "level", logging.INFO)
            monkeypatch.setattr(logger, "propagate", True)
            logger.info(f"{module.__name__} says")
            logger.warning("[rank: 1] a warning")
            logger.info("[rank: 1] Seed set to 0")
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert said == ([] if rank else [f"{module.__name__} says" for module in modules])
    assert len(caplog.records) - len(said) == len(modules)


@pytest.mark.parametrize("text", ["💡 Tip: buy", "TPU available: False, using: 0", "GPU available: False, used: False"])
def test_advertisements_are_hidden(text: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(rank_zero.__name__)
    with caplog.at_level(logging.INFO, logger.name):
        logger.info(text)
        logger.info("GPU available: True (cuda), used: False")
    assert [record.getMessage() for record in caplog.records] == ["GPU available: True (cuda), used: False"]
