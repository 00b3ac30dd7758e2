"""What the checks of every step cost: `python -m tests.benchmarks.safety [--only dp2 ...] [--rounds N]`.

Gloo ranks with one thread each train a model. The checks of a step are on in a block of steps, off in the next, and so
on: NaN and infinity before an optimizer step, whether a rank was asked to stop, notes of what the main thread is doing.
It is the same training, with its weights at the same addresses; two trainings side by side differ by more than the
checks cost. The figure is the median over rounds of the ratio of the two times. The thread that watches the other ranks
lives as long as the training, so its share is stated as processor time.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
from typing_extensions import override

from lightning_hybrid import HybridStrategy, Layout
from tests.benchmarks.contest import WARM_UP_BLOCKS, Block, Result, keep_to_own_cores, time_of_all
from tests.benchmarks.contestants import SEED, Model, Size, fit
from tests.benchmarks.overhead import TIMEOUT_SECONDS, versions
from tests.harness import RankGroup

LAYOUTS = ("dp2", "fsdp2", "tp2", "pp2")
BOUND = 1.01


class Switched(HybridStrategy):
    """Its checks of a step can be switched off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checks = True

    @override
    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        nonfinite, watch, preemption = self.engine.optimizers.nonfinite, self._world.monitor, self._world.preemption
        nonfinite.__dict__.update(check=self._switched(nonfinite.check), saw_loss=self._switched(nonfinite.saw_loss))
        watch.__dict__["during"] = self._switched(watch.during, nullcontext())
        preemption.__dict__["agree"] = self._switched(preemption.agree, False)

    def callbacks(self) -> list[L.Callback]:
        """What else is part of the training."""
        return []

    def _switched(self, check: Callable[..., Any], off: Any = None) -> Callable[..., Any]:
        return lambda *args: check(*args) if self.checks else off


class Switch(L.Callback):
    """Switches the checks after each block of steps, and takes its time."""

    def __init__(self, strategy: Switched, rounds: int, steps: int) -> None:
        self._strategy, self._rounds, self._steps = strategy, rounds, steps
        self.blocks: dict[bool, list[Block]] = {True: [], False: []}
        self.watch_share = 0.0
        self._start = self._watch_start = (0.0, 0.0)

    @property
    def total_steps(self) -> int:
        """Of the training."""
        return (WARM_UP_BLOCKS + 2 * self._rounds) * self._steps

    def on_train_start(self, *_: Any) -> None:
        """The watch has begun."""
        self._watch_start = (time.perf_counter(), _watch_seconds())

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """A block begins; who comes first changes every round."""
        block, step = divmod(trainer.global_step, self._steps)
        if step == 0:
            self._strategy.checks = block % 4 in (0, 3)
            self._start = time_of_all()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A block ends."""
        block, step = divmod(trainer.global_step, self._steps)
        if step == 0:
            timed = Block.between(self._start, time_of_all())
            if block > WARM_UP_BLOCKS:
                self.blocks[self._strategy.checks].append(timed)

    def on_train_end(self, *_: Any) -> None:
        """The watch is about to end."""
        wall, cpu = self._watch_start
        self.watch_share = (_watch_seconds() - cpu) / (time.perf_counter() - wall)


def _watch_seconds() -> float:
    ident = next(t.ident for t in threading.enumerate() if t.name == "failure monitor")
    return time.clock_gettime(time.pthread_getcpuclockid(ident))  # type: ignore[arg-type]  -- it has started


@dataclass(frozen=True)
class Cost:
    """Of one layout, on rank 0."""

    steps: Result
    watch_share: float


def measure(layout: str, size: Size, rounds: int, steps: int, kind: type[Switched] = Switched) -> Cost:
    """Runs on every rank."""
    keep_to_own_cores()
    L.seed_everything(SEED, verbose=False)
    strategy = kind(layout=layout, microbatches=size.microbatches if "pp" in layout else "auto")
    interceptor = Switch(strategy, rounds, steps)
    replicas = Layout.parse(layout).replicas
    callbacks = [*strategy.callbacks(), interceptor]
    options = {"steps": interceptor.total_steps, "replicas": replicas, "log_every_n_steps": steps}
    fit(Model(size), strategy, callbacks, size, **options)
    on, off = (tuple(interceptor.blocks[checks]) for checks in (True, False))
    return Cost(Result(on, off, steps, loss_difference=0.0), interceptor.watch_share)


def run(
    only: Sequence[str], rounds: int, steps: int, size: Size | None = None, kind: type[Switched] = Switched
) -> dict[str, Cost]:
    """Measures the layouts in `only`, or all.

    Args:
        only: Layouts; none for all.
        rounds: Pairs of blocks that count.
        steps: Training steps in a block.
        size: Of the model, instead of the benchmark's own.
        kind: What is switched.
    """
    results = {}
    for layout in only or LAYOUTS:
        with RankGroup(Layout.parse(layout).devices, timeout_seconds=TIMEOUT_SECONDS) as ranks:
            results[layout] = ranks.call(measure, layout, size or Size(), rounds, steps, kind)[0]
    return results


def table(results: dict[str, Cost], what: str = "checks", bound: float = BOUND) -> str:
    """The results as a markdown table."""
    lines = [
        f"| layout | with {what}, ms per step | without, ms per step | ratio, median | quartiles | CPU time | bound "
        "| monitor thread, share of a core |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layout, cost in results.items():
        result = cost.steps
        first, third = result.quartiles
        mine, other = result.step_seconds(result.ours), result.step_seconds(result.reference)
        lines.append(
            f"| `{layout}` | {mine * 1e3:.1f} | {other * 1e3:.1f} | {result.ratio:.4f} "
            f"| {first:.3f} to {third:.3f} | {result.cpu_ratio:.4f} | {bound} | {cost.watch_share:.2%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="Step time with and without the checks.")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=[], help="layouts; all if left out")
    parser.add_argument("--rounds", type=int, default=60, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=4, help="training steps in a block")
    options = parser.parse_args(arguments)
    print(f"{versions()}, {options.rounds} rounds of {options.steps} steps\n")
    print(table(run(options.only, options.rounds, options.steps)))


if __name__ == "__main__":
    main()
