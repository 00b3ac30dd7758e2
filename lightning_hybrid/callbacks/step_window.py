"""Counts steps, samples and times on the host between two logged steps."""

from __future__ import annotations

import math
import time
from typing import Any

_SPLIT_STEPS = 50
"""Steps of a window whose time is split; later ones are not, to bound the memory of the measurements. Empirical."""


class StepWindow:
    """The steps since the last logged one. A step lasts from the end of the step before until its own end.

    Time spent in validation is left out.
    """

    def __init__(self) -> None:
        self._pause_begun: float | None = None
        self._fetch_begun: float | None = None
        self.restart(None)

    def restart(self, now: float | None) -> None:
        """Starts to count steps at the time `now`; None: steps are not counted yet."""
        self._began = self._last_end = now
        self.steps = self.split_steps = 0
        self.samples = self.tokens = 0.0
        self.split_seconds = self.data_wait = 0.0
        self._seconds = self._step_pause = self._step_wait = 0.0
        self._splits = False

    @property
    def counts(self) -> bool:
        """True if steps are counted."""
        return self._began is not None

    def begin_batch(self) -> bool:
        """Returns True if the time of the running step is to be split."""
        self._splits = self.counts and self.split_steps < _SPLIT_STEPS
        return self._splits

    def add(self, samples: float, tokens: float) -> None:
        """Counts a batch of this replica."""
        if self.counts:
            self.samples += samples
            self.tokens += tokens

    def end_step(self, now: float) -> None:
        """Ends a step of the optimizer."""
        if self._last_end is None:
            return
        seconds = now - self._last_end - self._step_pause
        self.steps += 1
        self._seconds += seconds
        if self._splits:
            self.split_steps += 1
            self.split_seconds += seconds
            self.data_wait += self._step_wait
        self._step_pause = self._step_wait = 0.0
        self._last_end = now

    def pause(self) -> None:
        """Leaves out the time until `resume`."""
        self._pause_begun = time.perf_counter()

    def resume(self) -> None:
        """Ends what `pause` has begun."""
        if self._pause_begun is not None:
            self._step_pause += time.perf_counter() - self._pause_begun
        self._pause_begun = None

    def fetching_begins(self) -> None:
        """Called when the loop asks the loader for a batch."""
        self._fetch_begun = time.perf_counter()

    def fetching_ends(self) -> None:
        """Called when the loader has returned a batch."""
        if self._fetch_begun is not None:
            self._step_wait += time.perf_counter() - self._fetch_begun
        self._fetch_begun = None

    def measurements(self) -> dict[str, Any]:
        """Returns fields of `RankMeasurements`."""
        if not self.steps:
            return {}
        return {
            "seconds": self._seconds,
            "steps": float(self.steps),
            "samples": self.samples,
            "tokens": self.tokens,
            "split_seconds": self.split_seconds,
            "split_steps": float(self.split_steps),
            "data_wait": self.data_wait if self.split_steps else math.nan,
        }
