"""What `HybridMonitor` costs: `python -m tests.benchmarks.monitor [--only dp2 ...] [--rounds N] [--steps N]`.

As in `tests.benchmarks.safety`, blocks of steps with and without the monitor take turns in one training. The last step
of each block is logged, to no logger.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning.pytorch as L
from typing_extensions import override

from lightning_hybrid import HybridStrategy
from lightning_hybrid.callbacks import HybridMonitor
from tests.benchmarks.overhead import versions
from tests.benchmarks.safety import LAYOUTS, Switched, run, table


class Switchable(HybridMonitor):
    """A monitor that can be taken off and put on again between two steps."""

    def switch(self, on: bool, strategy: HybridStrategy) -> None:
        """Measures from now on, or not."""
        if not on:
            self._end()
        elif self._engine is None and strategy._engine is not None:
            known = self._flops_per_unit
            self._follow(strategy.engine)
            self._batches, self._flops_per_unit = 2, known  # neither warm-up nor a count again


class Monitored(Switched):
    """The monitor is what is switched, not the checks."""

    def __init__(self, *args, **kwargs) -> None:
        self.monitor = Switchable(progress_bar=False)
        super().__init__(*args, **kwargs)

    @property
    def checks(self) -> bool:  # type: ignore[override]
        """True while the monitor measures."""
        return self._on

    @checks.setter
    def checks(self, on: bool) -> None:
        self._on = on
        self.monitor.switch(on, self)

    @override
    def setup(self, trainer: L.Trainer) -> None:
        super(Switched, self).setup(trainer)  # without switches of the checks

    @override
    def callbacks(self) -> list[L.Callback]:
        return [self.monitor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description="Step time with and without HybridMonitor.")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=[], help="layouts; all if left out")
    parser.add_argument("--rounds", type=int, default=30, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=10, help="training steps in a block, one of them logged")
    options = parser.parse_args(arguments)
    print(f"{versions()}, {options.rounds} rounds of {options.steps} steps\n")
    print(table(run(options.only, options.rounds, options.steps, kind=Monitored), "the monitor"))


if __name__ == "__main__":
    main()
