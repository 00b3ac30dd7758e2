"""Two trainings in one process, a few steps of one after a few steps of the other, so that both see the same machine.

Each training runs to its end in a thread of its own, but only one of them is ever awake: it hands over at the end of a
block of steps and sleeps until the next. The ranks of a process group hand over in the same order. Where there are
enough cores, each rank keeps to its share: moved about, ranks preempt each other for milliseconds at a time.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist

Training = Callable[["Contestant"], None]
"""Trains for `contestant.total_steps` steps and calls `step_starts` and `step_ends` around each."""

WARM_UP_BLOCKS = 2
"""Blocks that are not counted: optimizer state, gradient buckets and lazily built communicators are made in them."""


@dataclass(frozen=True)
class Block:
    """What one block of steps took on this rank."""

    wall_seconds: float
    """From the first step's start to the last step's end, on all ranks."""
    cpu_seconds: float
    """Of all threads of this rank's process."""

    @classmethod
    def between(cls, start: tuple[float, float], end: tuple[float, float]) -> Block:
        """The block between two results of `time_of_all`."""
        return cls(end[0] - start[0], end[1] - start[1])


class Contestant:
    """One of the trainings.

    Args:
        training: Runs the training.
        rounds: Blocks that count.
        steps: Training steps in a block.
    """

    def __init__(self, training: Training, rounds: int, steps: int) -> None:
        self.rounds, self.steps = rounds, steps
        self.total_steps = (WARM_UP_BLOCKS + rounds) * steps
        self.losses: list[torch.Tensor] = []
        """Of every step, on the ranks that know it; on its device, so that a training need not wait for it."""
        self._training = training
        self._block = Block(0.0, 0.0)
        self._step = 0
        self._start = (0.0, 0.0)
        self._error: BaseException | None = None
        self._wake, self._asleep = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    # ---- for whoever alternates

    def prepare(self) -> None:
        """Runs the training up to its first step."""
        self._thread.start()
        self._hand_over()

    def run_block(self) -> Block:
        """Runs a block of steps; the last one of all also ends the training."""
        self._hand_over()
        return self._block

    def _hand_over(self) -> None:
        self._wake.release()
        self._asleep.acquire()
        if self._error is not None:
            raise self._error

    # ---- for the training

    def step_starts(self) -> None:
        """To be called at the start of each step."""
        if self._step % self.steps:
            return
        self._asleep.release()
        self._wake.acquire()
        self._start = time_of_all()

    def step_ends(self) -> None:
        """To be called at the end of each step."""
        self._step += 1
        if self._step % self.steps == 0:
            self._block = Block.between(self._start, time_of_all())

    def _run(self) -> None:
        self._wake.acquire()
        try:
            self._training(self)
        except BaseException as error:  # goes to the thread that alternates, which raises it
            self._error = error
        self._asleep.release()


def time_of_all() -> tuple[float, float]:
    """Wall-clock and processor time, once this rank's device has done its work and so have the other ranks."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    return time.perf_counter(), time.process_time()


class Clock(L.Callback):
    """Reports the steps of `Trainer.fit` to a contestant."""

    def __init__(self, contestant: Contestant) -> None:
        self._contestant = contestant

    def on_train_batch_start(self, *_: Any) -> None:
        """Pass it on."""
        self._contestant.step_starts()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Pass it on, with the loss."""
        self._contestant.losses.append(outputs["loss"].detach())
        self._contestant.step_ends()


@dataclass(frozen=True)
class Result:
    """Blocks of two contestants, one pair a round."""

    ours: tuple[Block, ...]
    reference: tuple[Block, ...]
    steps: int
    loss_difference: float
    """Largest relative difference of the losses of a step: both must have trained the same thing."""

    @property
    def ratios(self) -> list[float]:
        """Wall-clock time of ours over that of the reference, by round."""
        return [a.wall_seconds / b.wall_seconds for a, b in zip(self.ours, self.reference, strict=True)]

    @property
    def cpu_ratio(self) -> float:
        """Median over rounds of the ratio of processor times."""
        pairs = zip(self.ours, self.reference, strict=True)
        return statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs)

    @property
    def ratio(self) -> float:
        """Median over rounds."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios."""
        return quartiles(self.ratios)

    def step_seconds(self, blocks: Sequence[Block]) -> float:
        """Median wall-clock time of a step."""
        return statistics.median(block.wall_seconds for block in blocks) / self.steps


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of a single value, that value twice."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def keep_to_own_cores() -> None:
    """Binds this rank's process to its share of the cores, if there are as many as ranks, all on this machine."""
    rank, ranks = (int(os.environ[name]) for name in ("LOCAL_RANK", "WORLD_SIZE"))
    if not hasattr(os, "sched_setaffinity"):  # not on macOS
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= ranks:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores[rank::ranks])


def compete(ours: Training, reference: Training, *, rounds: int, steps: int) -> Result:
    """Runs both trainings, a block of one and a block of the other by turns; who begins changes every round.

    Args:
        ours: The training under `HybridStrategy`.
        reference: What it is measured against.
        rounds: Pairs of blocks that count.
        steps: Training steps in a block.
    """
    keep_to_own_cores()
    contestants = Contestant(ours, rounds, steps), Contestant(reference, rounds, steps)
    for contestant in contestants:
        contestant.prepare()
    blocks: tuple[list[Block], list[Block]] = [], []
    for number in range(WARM_UP_BLOCKS + rounds):
        for i in (0, 1) if number % 2 else (1, 0):
            blocks[i].append(contestants[i].run_block())
    difference = _difference(contestants[0].losses, contestants[1].losses)
    return Result(tuple(blocks[0][WARM_UP_BLOCKS:]), tuple(blocks[1][WARM_UP_BLOCKS:]), steps, difference)


_COMPARED_STEPS = 20
"""Afterwards the rounding of the first steps has grown, as it does between any two orders of summation."""


def _difference(losses: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Zero where one of them does not know its losses (the first stage of a hand-written pipeline)."""
    if not losses or not others:
        return 0.0
    pairs = list(zip(losses, others, strict=True))[:_COMPARED_STEPS]
    return max(abs(float(a) - float(b)) / abs(float(b)) for a, b in pairs)
