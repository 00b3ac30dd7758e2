"""A user's script, started by `test_launch.py` in each of the ways in which people start theirs."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

import lightning_hybrid
from tests.zoo.case import BATCH_SIZE, STEPS, Samples
from tests.zoo.cases import CASES


def main() -> None:
    """Train `--times` times, each with a new Trainer, and write what every rank saw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="hybrid")
    parser.add_argument("--layout")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    metrics = []
    case = CASES["tied"]
    for _ in range(options.times):
        L.seed_everything(7, verbose=False)
        strategy = lightning_hybrid.HybridStrategy(layout=options.layout) if options.layout else options.strategy
        trainer = L.Trainer(
            accelerator="cpu",
            devices=options.devices,
            strategy=strategy,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        size = BATCH_SIZE // options.devices
        train = DataLoader(Samples(case.sample, STEPS * BATCH_SIZE), batch_size=size, shuffle=True)
        trainer.fit(case.build(), train, DataLoader(Samples(case.sample, BATCH_SIZE, seed=2), batch_size=size))
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    seen = {"pid": os.getpid(), "strategy": type(trainer.strategy).__name__, "metrics": metrics}
    (options.out / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
