"""The split of a step's time, on a clock that is moved by hand through schedules that are drawn by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_hybrid.engine import clocks
from lightning_hybrid.engine.clocks import ClockSet
from lightning_hybrid.engine.step_times import StepTimes


class Rank:
    """A rank whose clock goes on only when something takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pipelined: bool) -> None:
        self.now = 0.0
        monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: self.now))
        pipeline = object() if pipelined else None
        runner: Any = SimpleNamespace(device=torch.device("cpu"), pipeline=pipeline, clocks=ClockSet())
        self.times = StepTimes(runner)
        self.times.measures = True
        runner.clocks.add(self.times)
        self.clocks: ClockSet = runner.clocks

    def takes(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds

    def waits(self, seconds: float) -> None:
        """Communicates, within communication: the inner part must not count again."""
        with self.clocks.waiting(), self.clocks.waiting():
            self.takes(seconds)

    def passes(self, stage: int, seconds: float, communication: float = 0.0) -> None:
        """Runs a forward or backward pass of a stage, with communication within it."""
        with self.clocks.stage(stage):
            self.takes(seconds - communication)
            if communication:
                self.waits(communication)


def test_a_pipeline_of_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of GPipe with two microbatches: forward passes take 1 s, backward passes 2 s, a transfer 0.25 s.

    ::

        rank 0:  F0 F1 . . . . B0 B0 . B1 B1 | all-reduce
        rank 1:     F0 F1 B0 B0 B1 B1        |
    """
    rank = Rank(monkeypatch, pipelined=True)
    rank.clocks.begin_batch([0])
    for _ in range(2):
        rank.passes(0, 1.0, communication=0.125)  # an all-reduce of `tp`
    rank.takes(1.0)  # nothing to do
    rank.waits(0.25)  # receives from rank 1
    rank.passes(0, 2.0)
    rank.waits(0.25)
    rank.passes(0, 2.0)
    rank.clocks.end_batch()
    rank.waits(0.5)  # gradients of other replicas
    rank.takes(10.0)  # the optimizer
    split = rank.times.read()
    assert split.stages == {0: 6.0}
    assert split.computation == 6.0 - 0.25
    assert split.bubble == 1.0
    assert split.communication == 0.25 + 2 * 0.25 + 0.5


def test_two_stages_of_one_rank_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch, pipelined=True)
    rank.clocks.begin_batch([0, 3])
    for stage, seconds in ((0, 1.0), (3, 1.5), (3, 3.0), (0, 2.0)):
        rank.passes(stage, seconds)
        rank.takes(0.5)
    rank.clocks.end_batch()
    split = rank.times.read()
    assert split.stages == {0: 3.0, 3: 4.5}
    assert (split.computation, split.bubble, split.communication) == (7.5, 2.0, 0.0)


def test_without_a_pipeline_all_but_communication_is_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch, pipelined=False)
    for _ in range(2):  # accumulated batches
        rank.clocks.begin_batch([])
        rank.takes(3.0)
        rank.waits(0.5)  # gathers weights
        rank.clocks.end_batch()
    rank.waits(0.25)
    split = rank.times.read()
    assert (split.computation, split.communication, split.bubble) == (6.0, 1.25, 0.0)
    empty = rank.times.read()
    assert (empty.computation, empty.communication) == (0.0, 0.0), "read once"


def test_steps_that_are_not_measured_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch, pipelined=True)

    def batch() -> None:
        rank.clocks.begin_batch([0])
        rank.passes(0, 1.0)
        rank.waits(1.0)
        rank.clocks.end_batch()

    with rank.clocks.paused():  # a step that is no step of the training
        batch()
    rank.times.measures = False
    batch()
    split = rank.times.read()
    assert (split.computation, split.communication, split.bubble, split.stages) == (0.0, 0.0, 0.0, {})
