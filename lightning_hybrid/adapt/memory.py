"""The micro-batch that memory allows: a model of the peak, and a search that trusts only what was tried."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """P(b) = max(P_opt, max over k of a_k + c_k b): the peak memory of a step by its micro-batch size b.

    Tensors that are alive at one place of a step take a + c b bytes there. The peak is the largest of these lines: for
    small micro-batches often that of the end of the backward pass, where all gradients are, and for large ones that of
    the loss, where all activations are. With one line it is max(P_opt, a + c b).
    """

    optimizer_bytes: int
    """P_opt, the peak of the optimizer's step."""
    lines: tuple[tuple[float, float], ...]
    """(a_k in bytes, c_k in bytes a sample), by rising c_k; none below the others everywhere."""

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError("`lines` must have at least one line. Got none.")

    def predict(self, size: int) -> int:
        """P(b) in bytes, for a micro-batch of `size` samples."""
        return max(self.optimizer_bytes, *(math.ceil(a + c * size) for a, c in self.lines))

    def largest(self, budget_bytes: int, at_most: int) -> int:
        """The largest micro-batch up to `at_most` samples that should fit into `budget_bytes`; 0 if none does."""
        if self.optimizer_bytes > budget_bytes:
            return 0
        size = at_most
        for a, c in self.lines:
            if a > budget_bytes:
                return 0
            if c > 0:
                size = min(size, math.floor((budget_bytes - a) / c))
        while size > 0 and self.predict(size) > budget_bytes:  # rounding
            size -= 1
        return size


def fit_peaks(optimizer_bytes: int, peaks: Mapping[int, int]) -> MemoryFit:
    """Fits a + c b to the peaks of steps of two sizes, the largest that were measured.

    Args:
        optimizer_bytes: P_opt.
        peaks: Measured peaks in bytes, by size in samples; at least two.

    Raises:
        ValueError: If there are fewer.
    """
    if len(peaks) < 2:
        raise ValueError(f"`peaks` must have at least two sizes. Got {sorted(peaks)}.")
    first, second = sorted(peaks)[-2:]
    return MemoryFit(optimizer_bytes=optimizer_bytes, lines=(_line(first, peaks[first], second, peaks[second]),))


def fit_profiles(optimizer_bytes: int, profiles: Mapping[int, Sequence[int]]) -> MemoryFit:
    """Fits a line to every place of a step of two sizes; of these it keeps the upper envelope.

    Where the two steps did not allocate equally often, as with control flow that depends on the data, it is the fit of
    the two peaks.

    Args:
        optimizer_bytes: P_opt.
        profiles: For two sizes in samples: bytes alive after each allocation of the step.

    Raises:
        ValueError: If it is not two sizes.
    """
    if len(profiles) != 2:
        raise ValueError(f"`profiles` must have two sizes. Got {sorted(profiles)}.")
    first, second = sorted(profiles)
    if len(profiles[first]) != len(profiles[second]):
        return fit_peaks(optimizer_bytes, {size: max(profile) for size, profile in profiles.items()})
    places = zip(profiles[first], profiles[second], strict=True)
    lines = {_line(first, low, second, high) for low, high in places}
    return MemoryFit(optimizer_bytes=optimizer_bytes, lines=_upper_envelope(lines))


def _line(first: int, low: int, second: int, high: int) -> tuple[float, float]:
    """The line through two points; one that falls is taken as constant, at the larger value."""
    slope = (high - low) / (second - first)
    return (low - slope * first, slope) if slope > 0 else (float(max(low, high)), 0.0)


def _upper_envelope(lines: set[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lines that are the largest somewhere at b >= 0, by rising slope."""
    kept: list[tuple[float, float]] = []
    best: dict[float, float] = {}
    for a, c in lines:
        best[c] = max(a, best.get(c, a))
    for c, a in sorted(best.items()):
        while kept and (kept[-1][0] <= a or (len(kept) > 1 and _hidden(kept[-2], kept[-1], (a, c)))):
            kept.pop()
        kept.append((a, c))
    return tuple(kept)


def _hidden(below: tuple[float, float], line: tuple[float, float], above: tuple[float, float]) -> bool:
    """Whether `line` is nowhere above both of its neighbours in slope."""
    crossing = (below[0] - above[0]) / (above[1] - below[1])
    return line[0] + line[1] * crossing <= below[0] + below[1] * crossing


def search_largest(ladder: Sequence[int], start: int, fits: Callable[[int], bool]) -> int | None:
    """The largest size that fits, among allowed ones, from few trials around a guess.

    From the largest allowed size up to `start` it goes up, or down, by one, two, four and so on allowed sizes until the
    answer changes, and then bisects. A guess that is right costs two trials; from the smallest size it is doubling.

    Args:
        ladder: The allowed sizes, ascending.
        start: The guess; any number.
        fits: Tries a size. If a size fits, smaller ones are taken to fit, too.

    Returns:
        A size for which `fits` was true; None if there is none.

    Raises:
        ValueError: If `ladder` is empty or does not ascend.
    """
    if not ladder or any(b <= a for a, b in zip(ladder, ladder[1:], strict=False)) or ladder[0] < 1:
        raise ValueError(f"`ladder` must have whole numbers of at least 1, ascending. Got {list(ladder)}.")
    index = max(0, bisect.bisect_right(ladder, start) - 1)
    fitting, failing, stride = -1, len(ladder), 1
    while fitting < index < failing:
        if fits(ladder[index]):
            fitting = index
            index = min(index + stride, len(ladder) - 1) if failing == len(ladder) else index
        else:
            failing = index
            index = max(index - stride, 0) if fitting == -1 else index
        stride *= 2
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(ladder[middle]):
            fitting = middle
        else:
            failing = middle
    return ladder[fitting] if fitting >= 0 else None
