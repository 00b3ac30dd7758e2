"""Runs with `HybridMonitor` whose operations, samples and tokens can be counted by hand; they run on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import yaml
from torch.utils.data import DataLoader, Dataset

from lightning_hybrid.callbacks import HybridMonitor
from lightning_hybrid.models import CausalLM, ExpertsConfig, TransformerConfig
from tests.distributed.callbacks.monitor_jobs import TIME, Tokens, Words
from tests.distributed.contract.jobs import make_trainer, start
from tests.distributed.contract.modules import Memory

QUICKSTART = Path(__file__).parents[3] / "recipes/quickstart.yaml"
BATCH = 4
UNITS = ("samples", "tokens")
EXPERTS = ExpertsConfig(experts=4, chosen=2, hidden=96, shared=1, dense_blocks=1)


def quickstart_shape(experts: bool = False) -> TransformerConfig:
    """The transformer of the quickstart recipe; with experts in all blocks but the first if wanted."""
    shape = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]["transformer"]
    return TransformerConfig(**shape, experts=EXPERTS if experts else None)


class Windows(Dataset):
    """Windows of tokens and of the tokens that follow them."""

    def __init__(self, length: int) -> None:
        self._tokens = torch.randint(256, (64, length + 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._tokens[index, :-1], self._tokens[index, 1:]


def quickstart(layout: str) -> list[dict[str, float]]:
    """The logged values of a few steps of the quickstart's model, or of one with experts under `ep`."""
    start()
    shape, memory = quickstart_shape(experts="ep" in layout), Memory()
    callbacks: list[L.Callback] = [HybridMonitor(peak_tflops=1.0)]
    options: dict[str, Any] = {"max_steps": 4, "log_every_n_steps": 4, "logger": memory, "callbacks": callbacks}
    trainer, n = make_trainer(layout, **options)
    trainer.fit(CausalLM(shape), DataLoader(Windows(shape.context_length), batch_size=BATCH // n))
    return [line for _, line in memory.lines if "layout/pp" in line]


class Counted(L.Callback):
    """Counts samples and tokens of each step of this replica, as they come from the loader."""

    def __init__(self) -> None:
        self.samples, self.tokens = [0], [0]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        runner = trainer.strategy.engine.runner  # type: ignore[attr-defined]
        if not runner.padding:  # a repeated batch, for a replica without samples of its own
            self.samples[-1] += len(batch)
            self.tokens[-1] += batch.numel()
        if trainer.global_step == len(self.samples):
            self.samples.append(0)
            self.tokens.append(0)


class Shorter:
    """Collates windows, and cuts each batch to another length."""

    def __call__(self, rows: list[torch.Tensor]) -> torch.Tensor:
        batch = torch.stack(rows)
        return batch[:, : TIME - int(batch[0, 0]) % 3]


def uneven(layout: str, samples: int, accumulate: int, every: int, cut: bool = False) -> dict[str, Any]:
    """Trains six epochs with a last batch that is smaller; what was logged, and the counts of this rank."""
    start()
    counted, memory = Counted(), Memory()
    callbacks: list[L.Callback] = [counted, HybridMonitor()]
    options: dict[str, Any] = {"max_epochs": 6, "log_every_n_steps": every, "logger": memory, "callbacks": callbacks}
    trainer, n = make_trainer(layout, accumulate_grad_batches=accumulate, **options)
    collate = Shorter() if cut else None
    trainer.fit(Words(), DataLoader(Tokens(samples), batch_size=16 // n, collate_fn=collate))
    lines = [{"step": step, **line} for step, line in memory.lines if "layout/pp" in line]
    return {"lines": lines, "samples": counted.samples, "tokens": counted.tokens}
