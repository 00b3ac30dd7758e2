"""What `HybridStrategy` costs: `python -m tests.benchmarks.overhead [--only dp2 ...] [--rounds N] [--steps N]`.

Two gloo ranks with one thread each train the same model under `HybridStrategy` and under what one would write by hand,
a block of steps each by turns, in the same processes. A step is a whole training step: fetching the batch, forward,
backward, communication, optimizer. The figure is the median over rounds of the ratio of the two times; a ratio below 1
means that `HybridStrategy` was faster. "CPU time" is the same ratio for the processor time of rank 0, which other load
on the machine disturbs less; it has no part in the bound. Then the memory of a rank is measured in fresh processes.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import lightning
import torch

from tests.benchmarks.contest import Result, compete
from tests.benchmarks.contestants import Size, by_hand, ours
from tests.benchmarks.memory import MEMORY_LAYOUTS, MemorySize, measure_memory
from tests.harness import RankGroup

TIMEOUT_SECONDS = 900.0
SAME_LOSS = 1e-3
"""Relative: beyond it the two did not train the same thing (AdamW makes much of rounding)."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One line of the table."""

    layout: str
    reference: str
    bound: float
    size: Size


COMPARISONS = (
    Comparison(layout="dp2", reference="DDPStrategy", bound=1.03, size=Size()),
    Comparison(layout="fsdp2", reference="ModelParallelStrategy, hand-written fully_shard", bound=1.05, size=Size()),
    Comparison(
        layout="tp2", reference="ModelParallelStrategy, hand-written parallelize_module", bound=1.05, size=Size()
    ),
    Comparison(layout="pp2", reference="hand-written stages, Schedule1F1B, plain loop", bound=1.05, size=Size()),
)


def measure(layout: str, size: Size, rounds: int, steps: int) -> Result:
    """Runs on every rank: both contestants of one line.

    Raises:
        RuntimeError: If their losses differ.
    """
    result = compete(ours(layout, size), by_hand(layout, size), rounds=rounds, steps=steps)
    if result.loss_difference > SAME_LOSS:
        raise RuntimeError(f"{layout}: the losses of the two differ by {result.loss_difference:.1e}, relative")
    return result


def table(results: Sequence[tuple[Comparison, Result]]) -> str:
    """The results as a markdown table."""
    lines = [
        "| layout | compared with | ours, ms per step | theirs, ms per step | ratio, median | quartiles | CPU time "
        "| bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line, result in results:
        first, third = result.quartiles
        mine, other = result.step_seconds(result.ours), result.step_seconds(result.reference)
        lines.append(
            f"| `{line.layout}` | {line.reference} | {mine * 1e3:.0f} | {other * 1e3:.0f} | {result.ratio:.3f} "
            f"| {first:.3f} to {third:.3f} | {result.cpu_ratio:.3f} | {line.bound:.2f} |"
        )
    return "\n".join(lines)


def versions() -> str:
    """What the figures hold for."""
    return f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"


def run(only: Sequence[str], rounds: int, steps: int, size: Size | None = None) -> list[tuple[Comparison, Result]]:
    """Measures the step times of the layouts in `only`, or of all.

    Args:
        only: Layouts; none for all.
        rounds: Pairs of blocks that count.
        steps: Training steps in a block.
        size: Of the model, instead of the benchmark's own.
    """
    results = []
    for line in COMPARISONS:
        if only and line.layout not in only:
            continue
        with RankGroup(2, timeout_seconds=TIMEOUT_SECONDS) as ranks:
            results.append((line, ranks.call(measure, line.layout, size or line.size, rounds, steps)[0]))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description="Step time and memory of HybridStrategy.")
    layouts = [line.layout for line in COMPARISONS]
    parser.add_argument("--only", nargs="+", choices=layouts, default=[], help="layouts; all if left out")
    parser.add_argument("--rounds", type=int, default=40, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=4, help="training steps in a block")
    options = parser.parse_args(arguments)
    print(f"{versions()}, {options.rounds} rounds of {options.steps} steps\n")
    print(table(run(options.only, options.rounds, options.steps)), "\n")
    print(measure_memory([x for x in MEMORY_LAYOUTS if not options.only or x in options.only], MemorySize()))


if __name__ == "__main__":
    main()
