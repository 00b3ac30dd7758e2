"""What the checks for NaN and infinity cost: `python -m tests.benchmarks.safety [--only dp2 ...] [--rounds N]`.

Gloo ranks with one thread each train the same model with and without the guard before each optimizer step, a block of
steps each by turns, in the same processes. The figure is the median over rounds of the ratio of the two times.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning.pytorch as L
from typing_extensions import override

from lightning_hybrid import HybridStrategy, Layout
from tests.benchmarks.contest import Contestant, Result, Training, compete
from tests.benchmarks.contestants import SEED, Model, Size, fit
from tests.benchmarks.overhead import TIMEOUT_SECONDS, versions
from tests.harness import RankGroup

LAYOUTS = ("dp2", "fsdp2", "tp2", "pp2")
BOUND = 1.01


class Unguarded(HybridStrategy):
    """Without the checks before an optimizer step."""

    @override
    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        self.steps.guard.__dict__.update(check=lambda *_: None, saw_loss=lambda *_: None)


def training(strategy_class: type[HybridStrategy], layout: str, size: Size) -> Training:
    """The module under one of the two strategies."""

    def run(contestant: Contestant) -> None:
        L.seed_everything(SEED, verbose=False)
        strategy = strategy_class(layout=layout, microbatches=size.microbatches if "pp" in layout else "auto")
        fit(Model(size), strategy, contestant, size, replicas=Layout.parse(layout).replicas)

    return run


def measure(layout: str, size: Size, rounds: int, steps: int) -> Result:
    """Runs on every rank."""
    guarded, unguarded = (training(kind, layout, size) for kind in (HybridStrategy, Unguarded))
    return compete(guarded, unguarded, rounds=rounds, steps=steps)


def run(only: Sequence[str], rounds: int, steps: int, size: Size | None = None) -> dict[str, Result]:
    """Measures the layouts in `only`, or all.

    Args:
        only: Layouts; none for all.
        rounds: Pairs of blocks that count.
        steps: Training steps in a block.
        size: Of the model, instead of the benchmark's own.
    """
    results = {}
    for layout in only or LAYOUTS:
        with RankGroup(Layout.parse(layout).devices, timeout_seconds=TIMEOUT_SECONDS) as ranks:
            results[layout] = ranks.call(measure, layout, size or Size(), rounds, steps)[0]
    return results


def table(results: dict[str, Result]) -> str:
    """The results as a markdown table."""
    lines = [
        "| layout | with the guard, ms a step | without, ms a step | ratio, median | quartiles | CPU time | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for layout, result in results.items():
        first, third = result.quartiles
        mine, other = result.step_seconds(result.ours), result.step_seconds(result.reference)
        lines.append(
            f"| `{layout}` | {mine * 1e3:.1f} | {other * 1e3:.1f} | {result.ratio:.4f} "
            f"| {first:.3f} to {third:.3f} | {result.cpu_ratio:.4f} | {BOUND} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="Step time with and without the guard.")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=[], help="layouts; all if left out")
    parser.add_argument("--rounds", type=int, default=60, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=4, help="training steps in a block")
    options = parser.parse_args(arguments)
    print(f"{versions()}, {options.rounds} rounds of {options.steps} steps\n")
    print(table(run(options.only, options.rounds, options.steps)))


if __name__ == "__main__":
    main()
