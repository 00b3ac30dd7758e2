"""What moving load recovers, kind by kind, against the best division; and what a change of layout takes.

    python -m tests.benchmarks.rebalancing            # all; or some of: stages replicas experts sequences layouts

Blocks sleep instead of computing, so that four ranks on two cores can be of different speed.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
import warnings
from collections.abc import Sequence
from statistics import median
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_hybrid import HybridStrategy, Layout
from lightning_hybrid.adapt.expert_placement import imbalance, kept_in_place, least_imbalance, owners, place_experts
from lightning_hybrid.adapt.shares import pack, sequence_cost
from lightning_hybrid.adapt.stage_cuts import best_cuts, step_seconds
from tests.benchmarks.contestants import Model, Size, Tokens
from tests.benchmarks.overhead import versions
from tests.distributed.callbacks import rebalancing_jobs as jobs
from tests.harness import RankGroup

BLOCKS, MICROBATCHES, SECONDS, SLOW = 16, 16, 0.01, {2: 2.0}
PATHS = (("dp4", "tp2-pp2", "fsdp2-tp2", "dp4"), ("fsdp4", "pp4", "dp2-pp2", "fsdp4"))


def stages(ranks: RankGroup) -> list[str]:
    """A pipeline of four ranks, one of them half as fast."""
    found = ranks.call(
        jobs.train,
        "pp4",
        True,
        blocks=BLOCKS,
        seconds=SECONDS,
        slow=SLOW,
        strategy_options={"microbatches": MICROBATCHES},
        steps=20,
    )[0]
    block = 3 * SECONDS  # forward, and twice as long backward
    costs, speeds = [block] * BLOCKS, [SLOW.get(r, 1.0) for r in range(4)]
    best = best_cuts(costs, speeds, MICROBATCHES, range(1, BLOCKS))
    assert best is not None
    bounds = [0, *best, BLOCKS]
    optimum = step_seconds(
        [sum(costs[a:b]) * s for a, b, s in zip(bounds, bounds[1:], speeds, strict=False)], MICROBATCHES
    )
    return row("stages: one of 4 half as fast, 16 blocks", found, optimum, f"cuts {found['cuts']}")


def replicas(ranks: RankGroup) -> list[str]:
    """Four replicas, one of them half as fast."""
    found = ranks.call(jobs.train, "dp4", True, blocks=4, seconds=0.003, slow=SLOW, by_sample=True, batch=32, steps=20)[
        0
    ]
    optimum = 10 * 3 * 0.003 * 4  # the slowest of 9, 9, 4 and 10 samples, or of 9, 9, 5 and 9
    return row("replicas: one of 4 half as fast, 32 samples", found, optimum, f"{found['moves'][0]['division']}")


def row(name: str, found: dict[str, Any], optimum: float, division: str) -> list[str]:
    """A line of the table."""
    first, last = found["first"], found["last"]
    return [name, f"{first:.3f}", f"{last:.3f}", f"{first / last:.2f}", f"{last / optimum:.2f}", division]


def experts() -> list[str]:
    """58 layers of 256 experts by Zipf's law on 32 ranks; decisions alone."""
    rng, layers = random.Random(0), []
    for _ in range(58):
        loads = [1 / (i + 1) for i in range(256)]
        rng.shuffle(loads)
        layers.append(loads)
    times, placed, owned = [], [], []
    in_order = [list(range(8 * r, 8 * r + 8)) for r in range(32)]
    for _ in range(5):
        began = time.perf_counter()
        placed = [kept_in_place(place_experts(loads, 32, 32), in_order) for loads in layers]
        owned = [owners(hosts, in_order) for hosts in placed]
        times.append(time.perf_counter() - began)
    found = max(imbalance(loads, p) for loads, p in zip(layers, placed, strict=True))
    alone = max(imbalance(loads, place_experts(loads, 32)) for loads in layers)
    bound = max(least_imbalance(loads, 32) for loads in layers)
    before = max(imbalance(loads, in_order) for loads in layers)
    sent = sum(len(set(h) - set(o)) for p, q in zip(placed, owned, strict=True) for h, o in zip(p, q, strict=True))
    text = f"max/mean {before:.2f} in order; {alone:.2f} placed (bound {bound:.2f}); {found:.3f} with 32 copies, "
    text += f"for which {sent / 58:.1f} experts are sent a pass"
    return ["experts: 58 x 256 on 32 ranks, Zipf", text, f"{min(times) * 1000:.0f} ms a plan"]


def sequences() -> list[str]:
    """1024 sequences into 64 parts."""
    rng = random.Random(2)
    costs = [sequence_cost(int(min(8192, 64 * rng.paretovariate(1.2))), 1024) for _ in range(1024)]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        found = pack(costs, 64)
        times.append(time.perf_counter() - began)
    bound = max(sum(costs) / 64, max(costs))
    packed = max(sum(costs[i] for i in b) for b in found) / bound
    in_turn = max(sum(costs[i::64]) for i in range(64)) / bound
    text = f"largest part {in_turn:.3f} of the bound in order; {packed:.4f} packed"
    return ["sequences: 1024 into 64", text, f"{min(times) * 1000:.1f} ms"]


class Moves(L.Callback):
    """Changes the layout every few steps."""

    def __init__(self, layouts: Sequence[str], every: int) -> None:
        self._layouts, self._every = list(layouts), every
        self.moved: list[tuple[str, str, int, float]] = []
        self.steps: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Between two steps."""
        dist.barrier()
        now = time.perf_counter()
        if self._last is not None:
            self.steps.append(now - self._last)
        self._last = now
        if trainer.global_step % self._every or not self._layouts:
            return
        strategy: Any = trainer.strategy
        moved = strategy.relayout(self._layouts.pop(0))
        self.moved.append((str(moved.before), str(moved.after), moved.sent_bytes, moved.seconds))
        self._last = None


def moves(path: Sequence[str]) -> tuple[list[tuple[str, str, int, float]], float]:
    """The changes of a run, and the median seconds of its steps; on every rank."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    size = Size(batch=16)
    callback = Moves([*path[1:], *path[1:]], every=4)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=4,
        strategy=HybridStrategy(layout=path[0]),
        max_steps=4 * (2 * len(path) - 1),
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(size), DataLoader(Tokens(size, 2000), batch_size=16 // Layout.parse(path[0]).replicas))
    return callback.moved, median(callback.steps)


def layouts(ranks: RankGroup) -> list[list[str]]:
    """A 14 MiB model with AdamW's state, 43 MiB in all; each path twice: process groups are made the first time."""
    rows = []
    for path in PATHS:
        found, step = ranks.call(moves, path)[0]
        for number, (before, after, sent, seconds) in enumerate(found):
            again = "again" if number >= len(path) - 1 else ""
            rows.append(
                [f"{before} -> {after} {again}", f"{sent / 2**20:.1f}", f"{seconds:.2f}", f"{seconds / step:.2f}"]
            )
    return rows


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in markdown."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    print("\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n", flush=True)


def main() -> None:
    """Runs what is asked for and prints the tables."""
    kinds = ["stages", "replicas", "experts", "sequences", "layouts"]
    parser = argparse.ArgumentParser(description="What moving load recovers.")
    parser.add_argument("kinds", nargs="*", choices=[*kinds, "all"], default="all")
    asked = parser.parse_args().kinds
    chosen = kinds if "all" in asked else asked
    print(f"{versions()}\n")
    with RankGroup(4, timeout_seconds=400) as ranks:
        timed = [kind(ranks) for name, kind in (("stages", stages), ("replicas", replicas)) if name in chosen]
        if timed:
            show(["", "seconds per step before", "after", "speed-up", "relative to the optimum", "division"], timed)
        decided = [kind() for name, kind in (("experts", experts), ("sequences", sequences)) if name in chosen]
        if decided:
            show(["", "balance", "time to decide"], decided)
        if "layouts" in chosen:
            show(["change", "MiB sent", "seconds", "in steps"], layouts(ranks))


if __name__ == "__main__":
    main()
