"""Measures where the time of this rank goes: computation per stage and per step, and waits for other ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from statistics import median
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Stopwatch:
    """Measures intervals of time on a device; on CUDA with events, which are read later.

    Args:
        device: The device whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def now(self) -> Any:
        """Returns a point in time."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """Returns the seconds between two points in time; waits until the device has reached `stop`."""
        if not self.is_cuda:
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


class Clock(Protocol):
    """What a runner tells of its steps."""

    def stage(self, stage: int) -> AbstractContextManager:
        """Surrounds the forward or the backward pass of one microbatch of a stage."""
        ...

    def begin_batch(self, stages: list[int]) -> None:
        """Called when a batch begins, which runs through `stages` of this rank."""
        ...

    def end_batch(self) -> None:
        """Called when this rank has the gradients of a batch, before they are synchronized; may be called again."""
        ...

    def waiting(self) -> AbstractContextManager:
        """Surrounds a time in which this rank may wait for other ranks."""
        ...


class ClockSet:
    """The clocks of a runner; a `Clock` itself, which does nothing while it has no clocks."""

    def __init__(self) -> None:
        self._clocks: list[Clock] = []
        self.is_paused = False
        """True in a step that is no step of the training."""

    def add(self, clock: Clock) -> None:
        """Starts a clock, between two batches."""
        self._clocks.append(clock)

    def remove(self, clock: Clock) -> None:
        """Stops a clock; does nothing if it does not run."""
        self._clocks = [c for c in self._clocks if c is not clock]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops all clocks for the duration of the context."""
        clocks, self._clocks, self.is_paused = self._clocks, [], True
        try:
            yield
        finally:
            self._clocks, self.is_paused = clocks, False

    def stage(self, stage: int) -> AbstractContextManager:
        """Surrounds the forward or the backward pass of one microbatch of a stage."""
        return self._all(lambda clock: clock.stage(stage))

    def begin_batch(self, stages: list[int]) -> None:
        """Called when a batch begins, which runs through `stages` of this rank."""
        for clock in self._clocks:
            clock.begin_batch(stages)

    def end_batch(self) -> None:
        """Called when this rank has the gradients of a batch, before they are synchronized; may be called again."""
        for clock in self._clocks:
            clock.end_batch()

    def waiting(self) -> AbstractContextManager:
        """Surrounds a time in which this rank may wait for other ranks."""
        return self._all(lambda clock: clock.waiting())

    def _all(self, context: Callable[[Clock], AbstractContextManager]) -> AbstractContextManager:
        if not self._clocks:
            return nullcontext()
        stack = ExitStack()
        for clock in self._clocks:
            stack.enter_context(context(clock))
        return stack


class Clocks:
    """Measures the computation time of a runner's stages and steps.

    Args:
        device: This rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._watch = Stopwatch(device)
        self._stages: dict[int, list[list[tuple[Any, Any]]]] = defaultdict(list)
        self._steps: list[list[tuple[Any, Any]]] = [[]]
        self._begun: Any = None
        self._calls: list[Any] = []
        self._handles: list[RemovableHandle] = []
        self.on_release: Callable[[], None] = lambda: None
        """Called when measuring ends."""

    def time_calls(self, modules: Iterable[nn.Module]) -> None:
        """Measures steps by the forward passes of `modules` only: between these, sharded ranks wait for other ranks.

        The time of `fully_shard` for gathering before and freeing after a call is not counted.
        """
        enter, leave = (cast(Any, torch.compiler.disable(hook)) for hook in (self._enter, self._leave))
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, prepend=True))

    def release(self) -> None:
        """Stops measuring."""
        while self._handles:
            self._handles.pop().remove()
        self.on_release()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._calls.append(self._watch.now())

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if torch.is_grad_enabled():
            self._steps[-1].append((self._calls.pop(), self._watch.now()))

    @contextmanager
    def stage(self, stage: int) -> Iterator[None]:
        """Measures the forward or the backward pass of one microbatch of a stage."""
        start = self._watch.now()
        yield
        self._stages[stage][-1].append((start, self._watch.now()))

    def begin_batch(self, stages: list[int]) -> None:
        """Starts measuring a batch, which runs through `stages` of this rank."""
        for stage in stages:
            self._stages[stage].append([])
        self._begun = self._watch.now()

    def end_batch(self) -> None:
        """Ends a batch, before gradients are synchronized; further calls have no effect."""
        if self._begun is not None:
            if not self._handles:
                self._steps[-1].append((self._begun, self._watch.now()))
            self._begun = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Excludes the time in the context, in which this rank may wait for other ranks."""
        runs = self._begun is not None
        self.end_batch()
        yield
        if runs:
            self._begun = self._watch.now()

    def end_step(self) -> None:
        """Ends a step of the optimizer."""
        self._steps.append([])

    def read(self, microbatches: int) -> tuple[dict[int, float], float]:
        """Returns medians since the last call: seconds of each stage per microbatch, and seconds per step.

        Args:
            microbatches: Number of microbatches per batch.
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
