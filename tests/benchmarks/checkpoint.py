"""Seconds to save and to load, against Lightning's ModelParallelStrategy, the same model sharded over two ranks.

    python -m tests.benchmarks.checkpoint [--rounds 5] [--width 2048]

Both save the model and its Adam states to the same disk and wait until they are on it (`fsync`), in alternating
rounds. Ours hashes what it writes and checks the hashes when it loads. Lightning's FSDPStrategy refuses to run without
a GPU; its checkpoints are written by the same torch.distributed.checkpoint as ModelParallelStrategy's.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.jobs import quiet
from tests.harness import RankGroup

LAYERS = 8
KINDS = ("lightning", "ours", "ours, asynchronous")


class Stack(L.LightningModule):
    """Linear layers, sharded by hand where the strategy asks the user to do so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers: Any = None

    def configure_model(self) -> None:
        if self.layers is None:
            self.layers = nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(LAYERS)))
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                assert self.device_mesh is not None
                for layer in self.layers:
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def _trainer(kind: str) -> L.Trainer:
    from lightning_hybrid import CheckpointOptions, HybridStrategy

    strategy: Any
    if kind == "lightning":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    else:
        options = CheckpointOptions(asynchronous=kind != "ours")
        strategy = HybridStrategy(layout="fsdp2", checkpoints=options)
    return L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def measure(kind: str, width: int, folder: str, number: int) -> dict[str, float]:
    """One save and one load on every rank: seconds until the call returns, until all is written, and to load."""
    quiet()
    data = DataLoader(TensorDataset(torch.randn(4, width)), batch_size=2)
    trainer = _trainer(kind)
    trainer.fit(Stack(width), data)
    path = str(Path(folder) / f"{number}.ckpt")
    trainer.strategy.barrier()
    start = time.perf_counter()
    trainer.save_checkpoint(path)
    blocked = time.perf_counter() - start
    checkpoints = getattr(trainer.strategy, "checkpoints", None)
    if checkpoints is not None:
        checkpoints.wait()
    trainer.strategy.barrier()
    written = time.perf_counter() - start

    trainer = _trainer(kind)
    connector: Any = trainer._checkpoint_connector
    seconds = []
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, _timed(getattr(connector, name), seconds))
    trainer.fit(Stack(width), data, ckpt_path=path, weights_only=False)
    return {"blocked": blocked, "written": written, "load": sum(seconds)}


def _timed(function: Any, seconds: list[float]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return run


def compare(rounds: int, width: int) -> dict[str, dict[str, float]]:
    """Medians over rounds of the slower rank's seconds, by kind."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with RankGroup(2, timeout_seconds=300) as ranks:
        for number in range(rounds + 1):
            for kind in KINDS:
                folder = tempfile.mkdtemp(prefix="checkpoints-")
                results = ranks.call(measure, kind, width, folder, number)
                shutil.rmtree(folder)
                if number > 0:  # the first round warms up
                    found[kind].append({key: max(r[key] for r in results) for key in results[0]})
    return {kind: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for kind, rs in found.items()}


def main() -> None:
    """Print a table with ratios to Lightning's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=2048)
    options = parser.parse_args()
    size = LAYERS * (options.width**2 + options.width) * 4 * 3 / 2**20
    print(f"{size:.0f} MiB of weights and Adam states, two ranks, medians of {options.rounds} rounds\n")
    results = compare(options.rounds, options.width)
    base = results["lightning"]
    print("| | training blocked | until written | load |\n|---|---|---|---|")
    for kind, row in results.items():
        cells = [f"{row[k]:.2f} s ({row[k] / base[k if k == 'load' else 'written']:.2f}x)" for k in row]
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
