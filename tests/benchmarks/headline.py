"""The headline: a traditional run against the scheme's, on equal data and hardware, with controls and ablations.

`python -m tests.benchmarks.headline --size cpu` trains every arm with the same search of its learning rate and two
seeds, and writes a table and a plot of loss against tokens and against time. Nothing is left out of the table.

Three questions, asked of the scheme against the traditional arm: after what share of the time does it have the other's
final validation loss; at what share of the peak memory of a device; is its loss worse at the same tokens.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tests.benchmarks.headline_arms import cpu, gpu
from tests.benchmarks.headline_run import Arm, Budget, Result, peak_memory, train
from tests.harness import RankGroup

MIB = 2**20
SEARCHED_SHARE = 0.25
"""Of an arm's own tokens, in each run of the search."""
TIMEOUT_SECONDS = 1800.0


@dataclass
class Outcome:
    """What came of an arm."""

    arm: Arm
    search: dict[float, float] = field(default_factory=dict)
    """Learning rate to bits per byte."""
    results: list[Result] = field(default_factory=list)
    """One for each seed."""
    peak_bytes: int = 0

    @property
    def learning_rate(self) -> float:
        """The best of the search."""
        return min(self.search, key=lambda rate: self.search[rate])

    @property
    def bits(self) -> float:
        """Mean over seeds, at the end."""
        return statistics.mean(r.bits for r in self.results)

    @property
    def spread(self) -> float:
        """Half the distance between the best and the worst seed."""
        return (max(r.bits for r in self.results) - min(r.bits for r in self.results)) / 2

    @property
    def seconds(self) -> float:
        """Mean over seeds, of the whole training."""
        return statistics.mean(r.seconds for r in self.results)

    def seconds_to(self, bits: float) -> float | None:
        """Mean time until the validation loss is at most `bits`; None if a seed does not get there."""
        times = [first_time(r.curve, bits) for r in self.results]
        return None if any(t is None for t in times) else statistics.mean(t for t in times if t is not None)


def first_time(curve: Sequence[tuple[int, float, float]], bits: float) -> float | None:
    """When a validation curve first is at `bits` or below, between two validations by a straight line."""
    before: tuple[int, float, float] | None = None
    for point in curve:
        if point[2] <= bits:
            if before is None or before[2] == point[2]:
                return point[1]
            share = (before[2] - bits) / (before[2] - point[2])
            return before[1] + share * (point[1] - before[1])
        before = point
    return None


def run_arm(arm: Arm, budget: Budget, seeds: Sequence[int]) -> Outcome:
    """Memory in processes of its own, then the search and the trainings."""
    outcome = Outcome(arm)
    with RankGroup(arm.devices, timeout_seconds=TIMEOUT_SECONDS) as ranks:
        outcome.peak_bytes = max(ranks.call(peak_memory, arm, budget))
    with RankGroup(arm.devices, timeout_seconds=TIMEOUT_SECONDS) as ranks:
        short = replace(budget, steps=round(budget.steps * SEARCHED_SHARE), evaluations=1)
        for rate in arm.learning_rates:
            outcome.search[rate] = ranks.call(train, arm, short, rate, seeds[0])[0].bits
        outcome.results = [ranks.call(train, arm, budget, outcome.learning_rate, seed)[0] for seed in seeds]
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each arm; the first is the one that the others are measured against."""
    base = outcomes[0]
    lines = [
        "| arm | description | layout | parameters | learning rate | tokens | bits per byte | time | time to the "
        "traditional arm's loss | peak memory per device |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        arm, reached = outcome.arm, outcome.seconds_to(base.bits)
        cells = [
            arm.name,
            arm.about,
            arm.layout,
            f"{outcome.results[0].parameters:,}",
            f"{outcome.learning_rate:g}",
            f"{outcome.results[0].curve[-1][0]:,}",
            f"{outcome.bits:.4f} ± {outcome.spread:.4f}",
            f"{outcome.seconds:.1f} s",
            "not reached" if reached is None else f"{reached / base.seconds:.2f}x",
            f"{outcome.peak_bytes / MIB:.1f} MiB, {outcome.peak_bytes / base.peak_bytes:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Loss against tokens and against time, of the first seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for outcome in outcomes:
        points = outcome.results[0].curve
        style = "-" if "scheme" in outcome.arm.name or outcome.arm.name == "traditional" else "--"
        for axis, column in zip(axes, (0, 1), strict=True):
            axis.plot([p[column] for p in points], [p[2] for p in points], style, label=outcome.arm.name, linewidth=1.2)
    for axis, label in zip(axes, ("tokens", "seconds of training"), strict=True):
        axis.axhline(outcomes[0].results[0].bits, color="grey", linewidth=0.6)
        axis.set_xlabel(label)
    axes[0].set_ylabel("validation loss, bits per byte")
    points = outcomes[0].results[0].curve
    last = max(p[2] for p in points[len(points) // 6 :])
    axes[0].set_ylim(top=last)
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, format="svg")


def hardware(budget: Budget) -> str:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if budget.device == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", help="names of some arms; the traditional one is always run")
    parser.add_argument("--out", type=Path, default=Path("runs/headline"), help="folder of the table and the plot")
    arguments = parser.parse_args()
    budget, arms = {"cpu": cpu, "gpu": gpu}[arguments.size]()
    chosen = [a for i, a in enumerate(arms) if i == 0 or not arguments.arms or a.name in arguments.arms]
    began, outcomes = time.monotonic(), []
    for arm in chosen:
        outcomes.append(run_arm(arm, budget, arguments.seeds))
        print(table(outcomes).splitlines()[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    minutes = (time.monotonic() - began) / 60
    note = f"{hardware(budget)}; {budget.tokens:,} tokens, seeds {arguments.seeds}; {minutes:.0f} minutes in all."
    (arguments.out / f"{arguments.size}.md").write_text(f"{table(outcomes)}\n\n{note}\n")
    plot(outcomes, arguments.out / f"{arguments.size}.svg")
    print(f"\n{table(outcomes)}\n\n{note}")


if __name__ == "__main__":
    main()
