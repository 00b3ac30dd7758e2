"""Runs of the package's own model, for the tests of its optimizers and of balancing; they run on every rank."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_hybrid.models import CausalLM, ExpertsConfig, LatentConfig, OptimizerConfig, TransformerConfig
from lightning_hybrid.models.experts import Router
from tests.distributed.jobs import quiet, verified_trainer_for, weights

VOCABULARY, TIME, BATCH = 64, 16, 16
SAVED_STEP = 4
"""The step after which a run is saved, in the middle of its second epoch."""


class Texts(Dataset):
    """Sequences that count upwards, half of them in steps of two."""

    def __init__(self, count: int) -> None:
        starts = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(3))
        self._text = (starts + torch.arange(TIME + 1) * (1 + torch.arange(count)[:, None] % 2)) % VOCABULARY

    def __len__(self) -> int:
        return len(self._text)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._text[index, :-1], self._text[index, 1:]


class Balance(L.Callback):
    """The routers' biases and MaxVio after each step, as this rank sees them."""

    def __init__(self, save: str | None) -> None:
        self._save = save
        self.biases: list[list[list[float]]] = []
        self.violations: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.biases.append([m.bias.tolist() for m in pl_module.modules() if isinstance(m, Router)])
        self.violations.append(float(trainer.callback_metrics.get("max_violation", torch.nan)))
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        if self._save is not None and trainer.global_step == SAVED_STEP:
            trainer.save_checkpoint(self._save)


def fit(
    layout: str | None,
    *,
    optimizer: dict[str, Any] | None = None,
    experts: dict[str, Any] | None = None,
    precision: Any = "32-true",
    save: str | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains a small model of the scheme under a layout; None: in one process."""
    quiet()
    L.seed_everything(7, verbose=False)
    mixture = ExpertsConfig(**{"experts": 4, "chosen": 2, "hidden": 32, "bias_rate": 0.01, **(experts or {})})
    config = TransformerConfig(
        vocabulary=VOCABULARY,
        width=64,
        heads=4,
        context_length=TIME,
        initial_std=0.1,
        latent=LatentConfig(key_value=16, rotary=8, head=8, value=16),
        experts=mixture,
    )
    module = CausalLM(config, OptimizerConfig(**{"learning_rate": 1e-2, "warmup_steps": 1, **(optimizer or {})}))
    balance = Balance(save)
    trainer, replicas = verified_trainer_for(
        layout, callbacks=[balance], max_steps=6, max_epochs=-1, precision=precision, **options
    )
    trainer.fit(module, DataLoader(Texts(48), batch_size=BATCH // replicas), ckpt_path=ckpt_path, weights_only=False)
    return {
        "weights": weights(trainer, module),
        "biases": balance.biases,
        "violations": balance.violations,
        "losses": balance.losses,
    }
