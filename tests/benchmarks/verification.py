"""Cost of `verify="start"` in steps: `python -m tests.benchmarks.verification`.

Trains a byte-level transformer on processes of this machine, and compares the time of the verification with the median
step after it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import lightning.pytorch as L

from lightning_hybrid import Layout
from lightning_hybrid.data import StdlibText
from lightning_hybrid.models import CausalLM, TransformerConfig
from tests.distributed.jobs import quiet, verified_trainer_for
from tests.harness import RankGroup

SIZES = {"quickstart": (128, 4, 4), "50M": (640, 10, 10)}
"""Width, blocks and heads: those of the quickstart, and 50 million parameters."""


class _Times(L.Callback):
    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.perf_counter() - self._begin)


def run(size: str, layout: str, verify: str, batch: int, steps: int) -> tuple[list[float], int]:
    """Seconds of each training batch, and the number of parameters."""
    quiet()
    L.seed_everything(0, verbose=False)
    width, blocks, heads = SIZES[size]
    module = CausalLM(TransformerConfig(width=width, blocks=blocks, heads=heads, context_length=128))
    count, times = sum(p.numel() for p in module.parameters()), _Times()
    trainer, _ = verified_trainer_for(
        layout, strategy_options={"verify": verify}, max_steps=steps, limit_val_batches=0, callbacks=[times]
    )
    trainer.fit(module, StdlibText(batch_size=batch, context_length=128))
    return times.steps, count


def main() -> None:
    """Prints a row for each size and layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--layouts", nargs="+", default=["dp2", "fsdp2", "tp2", "pp2"])
    parser.add_argument("--batch", type=int, default=8, help="windows of 128 bytes in a global batch")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    sys.stdout.write(
        "| model | parameters | layout | first step, unverified | verified | extra steps |\n|---|---|---|---|---|---|\n"
    )
    for size in options.sizes:
        for layout in options.layouts:
            with RankGroup(Layout.parse(layout).devices) as ranks:
                found = {}
                for verify in ("off", "start", "off", "start"):
                    times, count = ranks.call(
                        run, size, layout, verify, options.batch, options.steps, timeout_seconds=600
                    )[0]
                    step = statistics.median(times[2:])
                    found.setdefault(verify, []).append(times[0] / step)
            off, on = (min(found[v]) for v in ("off", "start"))
            sys.stdout.write(f"| {size} | {count / 1e6:.1f}M | {layout} | {off:.1f} | {on:.1f} | {on - off:.1f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
