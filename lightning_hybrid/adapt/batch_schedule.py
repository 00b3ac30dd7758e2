"""Batch size schedules, by consumed samples or tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BatchSizeSchedule:
    """Global batch sizes by consumed samples or tokens.

    Reference: DeepSeek-V3 (2024), section 4.2, grows from 3072 to 15360 sequences over the first 469B tokens:
    `BatchSizeSchedule(points={0: 3072, 469_000_000_000: 15360}, ramp=True, unit="tokens")`. Llama 3 (2024), section
    3.4.1, goes in steps: 4M tokens of sequences of 4096, 8M of 8192 after 252M tokens, 16M after 2.87T.
    """

    points: Mapping[int, int]
    """Global batch size in samples by consumed `unit`; the first point is at 0."""
    ramp: bool = False
    """True: interpolates linearly between two points. False: jumps at each point."""
    unit: Literal["samples", "tokens"] = "samples"
    """Unit of the points. Tokens of a batch are the elements of its first tensor."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", {int(k): int(v) for k, v in sorted(self.points.items())})
        if 0 not in self.points or min(self.points) < 0:
            raise ValueError(f"`points` must begin at 0. Got {list(self.points)}.")
        if min(self.points.values()) < 1:
            raise ValueError(f"`points` must have batch sizes of at least 1. Got {list(self.points.values())}.")
        if self.unit not in ("samples", "tokens"):
            raise ValueError(f"`unit` must be 'samples' or 'tokens'. Got {self.unit!r}.")

    def batch_size(self, consumed: int, multiple_of: int = 1) -> int:
        """Returns the batch size after `consumed` samples or tokens.

        Args:
            consumed: Consumed data, in `unit`.
            multiple_of: Sizes on a ramp are rounded down to a multiple of this.
        """
        before = max(at for at in self.points if at <= consumed)
        size = self.points[before]
        later = [at for at in self.points if at > consumed]
        if not (self.ramp and later):
            return size
        share = (consumed - before) / (later[0] - before)
        between = size + share * (self.points[later[0]] - size)
        return max(int(between) // multiple_of * multiple_of, min(size, self.points[later[0]]))
