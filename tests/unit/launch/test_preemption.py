"""SIGTERM: the note of one rank reaches all, and they stop before the same batch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_hybrid.launch.preemption import Preemption


class Ranks:
    """Stands in for the question to all ranks."""

    def __init__(self) -> None:
        self.asked: list[bool] = []
        self.other = False

    def any_rank(self, requested: bool) -> bool:
        self.asked.append(requested)
        return requested or self.other


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def before_batch(trainer: L.Trainer) -> None:
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor()


def test_ranks_that_have_told_each_other_in_the_step_do_not_ask(ranks: Ranks, trainer: L.Trainer):
    preemption = Preemption(ranks.any_rank)
    with preemption.installed(trainer):
        before_batch(trainer)
        assert ranks.asked == [False]
        preemption.hear(False)
        before_batch(trainer)
        assert ranks.asked == [False]
        before_batch(trainer)  # no optimizer step in between
        assert ranks.asked == [False, False]


@pytest.mark.parametrize("heard", [True, False])
def test_another_ranks_note_stops_this_one(ranks: Ranks, trainer: L.Trainer, heard):
    preemption = Preemption(ranks.any_rank)
    with preemption.installed(trainer):
        if heard:
            preemption.hear(True)
        else:
            ranks.other = True
        with pytest.raises(SIGTERMException):
            before_batch(trainer)
        assert trainer._signal_connector.received_sigterm


def test_what_an_earlier_run_heard_does_not_count(ranks: Ranks, trainer: L.Trainer):
    preemption = Preemption(ranks.any_rank)
    preemption.hear(True)
    with preemption.installed(trainer):
        before_batch(trainer)
        assert ranks.asked == [False]
