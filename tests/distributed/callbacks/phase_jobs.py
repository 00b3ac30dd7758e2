"""Runs that go through phases, and what one process does in their place; these run on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_hybrid.callbacks import Phase, PhaseSchedule
from lightning_hybrid.models import CausalLM
from lightning_hybrid.models.config import OptimizerConfig, TransformerConfig
from tests.distributed.callbacks.adaptive_jobs import SaveAt
from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights

VOCABULARY, LENGTH = 32, 16


class Windows(Dataset):
    """Random tokens and those that follow them."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


class Seen(L.Callback):
    """What every batch of this rank was run with."""

    def __init__(self, schedule: PhaseSchedule) -> None:
        self._schedule = schedule
        self.losses: list[float] = []
        self.batches: list[tuple[int, ...]] = []
        self.layouts: list[str] = []
        self.phases: list[int] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        first = batch["x"] if isinstance(batch, dict) else batch[0]
        self.batches.append(tuple(first.shape))
        strategy: Any = trainer.strategy
        self.layouts.append(str(strategy.layout))
        self.phases.append(self._schedule.phase)
        self.steps.append(trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = trainer.callback_metrics
        self.losses.append(float(metrics["loss_step"] if "loss_step" in metrics else metrics["train_loss"]))


class Seeded(CausalLM):
    """Its streams begin with the same weights wherever they are opened."""

    def open_streams(self, streams):
        torch.manual_seed(5)
        super().open_streams(streams)


def model() -> CausalLM:
    """A small Transformer."""
    config = TransformerConfig(vocabulary=VOCABULARY, width=32, blocks=4, heads=4, context_length=LENGTH)
    return Seeded(config, OptimizerConfig(learning_rate=3e-3, warmup_steps=0))


def train(
    layout: str,
    phases: Sequence[Phase],
    *,
    kind: str = "Classifier",
    batch: int = 8,
    samples: int = 96,
    save: str | None = None,
    save_at: int = 0,
    ckpt_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A run through phases."""
    quiet()
    L.seed_everything(7, verbose=False)
    module: Any = model() if kind == "CausalLM" else Classifier(optimizer="adamw")
    schedule = PhaseSchedule(phases)
    seen = Seen(schedule)
    callbacks: list[L.Callback] = [schedule, seen, *([SaveAt(save, save_at)] if save is not None else [])]
    trainer, replicas = trainer_for(layout, callbacks=callbacks, **{"max_epochs": -1, "max_steps": 12, **options})
    data: Any = Windows(samples) if kind == "CausalLM" else Numbers(samples)
    loader = DataLoader(data, batch_size=batch // replicas)
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=False)
    return {
        "losses": seen.losses,
        "batches": seen.batches,
        "layouts": seen.layouts,
        "phases": seen.phases,
        "steps": seen.steps,
        "state": schedule.state_dict(),
        "weights": weights(trainer, module),
        "streams": getattr(module, "hparams", {}).get("streams"),
        "logged": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }


def in_one_process(sizes: Sequence[int], lengths: Sequence[int], streams_at: int | None = None) -> dict[str, Any]:
    """Steps on so many windows each, split to such lengths, in a plain loop."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, data, used, losses = model(), Windows(96), 0, []
    module.trainer = L.Trainer(accelerator="cpu", logger=False, max_steps=len(sizes), enable_checkpointing=False)
    made: Any = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for step, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        if step == streams_at:
            open_streams(module, optimizer)
        rows = [data[i] for i in range(used, used + size)]
        batch = [torch.stack(part).reshape(-1, length) for part in zip(*rows, strict=True)]
        found = module.transformer(*batch)
        loss = found.next_token + found.balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(found.next_token.detach()))
        used = (used + size) % 96
    return {"losses": losses, "weights": module.state_dict()}


def open_streams(module: CausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Two streams from here on; the new weights go into the groups that they would be in."""
    known = {id(p) for p in module.parameters()}
    module.open_streams(2)
    made: Any = module.configure_optimizers()
    for group, fresh in zip(optimizer.param_groups, made["optimizer"].param_groups, strict=True):
        group["params"] += [p for p in fresh["params"] if id(p) not in known]
