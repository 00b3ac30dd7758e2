"""The microbatch that fits into memory: a linear model of the peak, and a search that returns only tried sizes."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """P(b) = max(P_opt, max over k of a_k + c_k b): the peak memory of a step with microbatches of b samples.

    The tensors alive at one point of a step take a + c b bytes. The peak is the maximum of these lines: for small
    microbatches often the end of the backward pass, where all gradients are alive, for large ones the loss, where all
    activations are alive. With a single line, P(b) = max(P_opt, a + c b).
    """

    optimizer_bytes: int
    """P_opt, the peak of the optimizer step."""
    lines: tuple[tuple[float, float], ...]
    """(a_k in bytes, c_k in bytes per sample), by rising c_k; each is the maximum for some b."""

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError("`lines` must have at least one line. Got none.")

    def predict(self, size: int) -> int:
        """Returns P(b) in bytes for a microbatch of `size` samples."""
        return max(self.optimizer_bytes, *(math.ceil(a + c * size) for a, c in self.lines))

    def largest(self, budget_bytes: int, at_most: int) -> int:
        """Returns the largest microbatch up to `at_most` samples predicted to fit `budget_bytes`; 0 if none does."""
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
    """Fits a + c b to the peaks of the two largest sizes.

    Args:
        optimizer_bytes: P_opt.
        peaks: Measured peaks in bytes, by size in samples; at least two.

    Raises:
        ValueError: If there are fewer than two sizes.
    """
    if len(peaks) < 2:
        raise ValueError(f"`peaks` must have at least two sizes. Got {sorted(peaks)}.")
    first, second = sorted(peaks)[-2:]
    return MemoryFit(optimizer_bytes=optimizer_bytes, lines=(_line(first, peaks[first], second, peaks[second]),))


def fit_profiles(optimizer_bytes: int, profiles: Mapping[int, Sequence[int]]) -> MemoryFit:
    """Fits a line to every allocation of a step at two sizes and keeps the upper envelope of the lines.

    Falls back to `fit_peaks` if the two steps have different numbers of allocations, for example because of control
    flow that depends on the data.

    Args:
        optimizer_bytes: P_opt.
        profiles: By size in samples, for two sizes: bytes alive after each allocation of the step.

    Raises:
        ValueError: If the number of sizes is not two.
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
    """Returns (a, c) of the line through two points; a falling line becomes a constant at the larger value."""
    slope = (high - low) / (second - first)
    return (low - slope * first, slope) if slope > 0 else (float(max(low, high)), 0.0)


def _upper_envelope(lines: set[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Returns the lines that are the maximum for some b >= 0, by rising slope."""
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
    """Returns True if `line` is nowhere above both of its neighbors in slope."""
    crossing = (below[0] - above[0]) / (above[1] - below[1])
    return line[0] + line[1] * crossing <= below[0] + below[1] * crossing


def search_largest(ladder: Sequence[int], start: int, fits: Callable[[int], bool]) -> int | None:
    """Finds the largest allowed size that fits, with few trials around a guess.

    Starts at the largest allowed size up to `start`, moves up or down by 1, 2, 4, … allowed sizes until the answer
    changes, then bisects. A correct guess costs two trials; starting at the smallest size, the search doubles.

    Args:
        ladder: The allowed sizes, ascending.
        start: The guess; any number.
        fits: Tries a size. Sizes below one that fits are assumed to fit.

    Returns:
        The largest size for which `fits` returned True; None if there is none.

    Raises:
        ValueError: If `ladder` is empty or not ascending.
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
