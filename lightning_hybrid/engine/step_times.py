"""Splits the time of training steps on this rank into computation, communication and waits for other stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lightning_hybrid._torch_private import timed_collectives, waits_seen
from lightning_hybrid.engine.clocks import Stopwatch
from lightning_hybrid.engine.step import StepRunner


@dataclass(frozen=True, kw_only=True)
class StepSplit:
    """Seconds of all measured batches on this rank."""

    computation: float
    """Forward and backward passes, without communication."""
    communication: float
    """Communication that the rank waits for: collectives, also within passes, and the last gradients of others."""
    bubble: float
    """Between the passes of pipeline stages: waits for other stages, and transfers of activations."""
    stages: dict[int, float]
    """Forward and backward passes of each stage of this rank, communication within them included."""


class StepTimes:
    """A clock (see `engine.clocks`) that splits the time of training batches, from `install` on.

    On CUDA times are those of the device's main stream, read later: transfers that overlap with computation do not
    count.

    Args:
        runner: Runs the steps of the partitioned module.
    """

    def __init__(self, runner: StepRunner) -> None:
        self._runner, self._watch = runner, Stopwatch(runner.device)
        self._patches = ExitStack()
        self._stream = torch.cuda.current_stream(runner.device) if runner.device.type == "cuda" else None
        self._pipelined = runner.pipeline is not None
        self._begun: Any = None
        self._stage: int | None = None
        self._waits = 0
        self.measures = False
        """True while a batch is measured."""
        self.reset()

    def install(self) -> None:
        """Starts measuring."""
        self._runner.clocks.add(self)
        self._patches.callback(self._runner.clocks.remove, self)
        self._patches.enter_context(timed_collectives(self.waiting))
        if self._watch.is_cuda:
            self._patches.enter_context(waits_seen(self._runner.root.modules(), self.waiting))

    def remove(self) -> None:
        """Stops measuring."""
        self._patches.close()

    def reset(self) -> None:
        """Discards all measurements."""
        self._batches: list[tuple[Any, Any]] = []
        self._stages: dict[int, list[tuple[Any, Any]]] = defaultdict(list)
        self._communication: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    # ---- called by the runner

    @contextmanager
    def stage(self, stage: int) -> Iterator[None]:
        """Measures the forward or the backward pass of one microbatch of a stage."""
        if not self.measures:
            yield
            return
        start, self._stage = self._watch.now(), stage
        yield
        self._stages[stage].append((start, self._watch.now()))
        self._stage = None

    def begin_batch(self, stages: list[int]) -> None:
        """Starts measuring a batch."""
        if self.measures:
            self._begun = self._watch.now()

    def end_batch(self) -> None:
        """Ends a batch, before gradients are synchronized; further calls have no effect."""
        if self._begun is not None:
            self._batches.append((self._begun, self._watch.now()))
            self._begun = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures communication, unless it is within another measured one or overlaps with computation."""
        if self._waits or not self.measures or self._runner.clocks.is_paused or self._overlaps():
            yield
            return
        place = "after" if self._begun is None else "between stages" if self._stage is None else "in stages"
        start = self._watch.now()
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1
        self._communication[place].append((start, self._watch.now()))

    def _overlaps(self) -> bool:
        return self._stream is not None and torch.cuda.current_stream(self._stream.device) != self._stream

    # ---- results

    def read(self) -> StepSplit:
        """Returns and resets the measurements; waits for the device."""
        batches = self._sum(self._batches)
        stages = {stage: self._sum(passes) for stage, passes in self._stages.items()}
        inside, between, after = (self._sum(self._communication[p]) for p in ("in stages", "between stages", "after"))
        passes = sum(stages.values())
        self.reset()
        if not self._pipelined:
            computation, bubble = batches - between, 0.0
        else:
            computation, bubble = passes - inside, batches - passes - between
        return StepSplit(
            computation=max(0.0, computation),
            communication=inside + between + after,
            bubble=max(0.0, bubble),
            stages=stages,
        )

    def _sum(self, intervals: list[tuple[Any, Any]]) -> float:
        return sum(self._watch.seconds(*interval) for interval in intervals)
