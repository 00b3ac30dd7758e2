"""How long this rank computes, apart from what it waits for others: by stage, and by step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch


class Stopwatch:
    """Intervals of a device's time; on a CUDA device they are read when they are asked for.

    Args:
        device: The device whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        """A point in time."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two points; waits for the second one."""
        if not self._cuda:
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


class Clocks:
    """The clocks of a runner, while somebody looks at them.

    Args:
        device: This rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._watch = Stopwatch(device)
        self._stages: dict[int, list[list[tuple[Any, Any]]]] = defaultdict(list)
        self._steps: list[list[tuple[Any, Any]]] = [[]]
        self._begun: Any = None

    @contextmanager
    def stage(self, stage: int) -> Iterator[None]:
        """Around the forward or the backward pass of one microbatch of a stage."""
        start = self._watch.now()
        yield
        self._stages[stage][-1].append((start, self._watch.now()))

    def begin_batch(self, stages: list[int]) -> None:
        """A batch begins; these stages are of this rank."""
        for stage in stages:
            self._stages[stage].append([])
        self._begun = self._watch.now()

    def end_batch(self) -> None:
        """Its gradients are there; what comes is the exchange with other ranks. Later calls do not count."""
        if self._begun is not None:
            self._steps[-1].append((self._begun, self._watch.now()))
            self._begun = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank may wait for others in the middle of a batch."""
        runs = self._begun is not None
        self.end_batch()
        yield
        if runs:
            self._begun = self._watch.now()

    def end_step(self) -> None:
        """The optimizer has made a step."""
        self._steps.append([])

    def take(self, microbatches: int) -> tuple[dict[int, float], float]:
        """Medians since the last call: of each stage's seconds for a microbatch, and of a step's.

        Args:
            microbatches: Of a batch.
        """
        stages = {
            stage: median(self._sum(b) for b in batches) / microbatches for stage, batches in self._stages.items()
        }
        steps = [self._sum(step) for step in self._steps if step]
        self._stages.clear()
        self._steps = [[]]
        return stages, median(steps) if steps else 0.0

    def _sum(self, intervals: list[tuple[Any, Any]]) -> float:
        return sum(self._watch.seconds(*interval) for interval in intervals)
