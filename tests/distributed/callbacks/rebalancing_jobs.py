"""Runs on ranks of different speed, whose load is moved while they train; these run on every rank."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from lightning_hybrid.callbacks import LoadRebalancing, Phase, PhaseSchedule, RebalancingRules
from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import WIDTH, Block, Numbers, quiet, trainer_for, weights


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        time.sleep(2 * ctx.seconds)
        return gradients[0], None


class SleepingBlock(Block):
    """Takes time, for each sample or for each call, more of it on slow ranks."""

    def __init__(self, seconds: float, slow: Mapping[int, float], by_sample: bool) -> None:
        super().__init__(WIDTH)
        self.seconds, self.slow, self.by_sample = seconds, dict(slow), by_sample

    def forward(self, x):
        seconds = self.seconds * (len(x) if self.by_sample else 1)
        rank = dist.get_rank() if dist.is_initialized() else 0
        # of the output: the input of the first block has no gradient, so nothing there would sleep in the backward pass
        return _Sleep.apply(super().forward(x), seconds * self.slow.get(rank, 1.0))


class Sleeper(L.LightningModule):
    """Blocks that take time; AdamW."""

    def __init__(self, blocks: int, seconds: float, slow: Mapping[int, float], by_sample: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SleepingBlock(seconds, slow, by_sample) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-4)


class Watching(L.Callback):
    """Losses, and the seconds of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["loss"]))
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def train(
    layout: str | None,
    rebalances: bool,
    *,
    steps: int = 14,
    batch: int = 16,
    blocks: int = 8,
    seconds: float = 0.002,
    slow: Mapping[int, float] | None = None,
    by_sample: bool = False,
    rules: Mapping[str, Any] | None = None,
    experts: bool = False,
    save: str | None = None,
    save_at: int = 0,
    ckpt_path: str | None = None,
    options: Mapping[str, Any] | None = None,
    module_options: Mapping[str, Any] | None = None,
    phases: Sequence[Phase] = (),
    **trainer_options: Any,
) -> dict[str, Any]:
    """A run, and what was moved in it."""
    quiet()
    L.seed_everything(7, verbose=False)
    mixture = {"adamw": True, "favorite": True, **(module_options or {})}
    module: Any = Mixture(**mixture) if experts else Sleeper(blocks, seconds, slow or {}, by_sample)
    chosen = RebalancingRules(**{"every_n_steps": 3, "rest_looks": 1, "horizon_steps": 10**6, **(rules or {})})
    rebalancing = LoadRebalancing(rules=chosen, **(options or {}))
    watching = Watching()
    callbacks: list[L.Callback] = [
        watching,
        *([PhaseSchedule(phases)] if phases else []),
        *([rebalancing] if rebalances else []),
    ]
    if save is not None:
        from tests.distributed.callbacks.adaptive_jobs import SaveAt

        callbacks.append(SaveAt(save, save_at))
    trainer, replicas = trainer_for(
        layout, callbacks=callbacks, **{"max_epochs": -1, "max_steps": steps, **trainer_options}
    )
    data = DataLoader(Numbers(64 * batch), batch_size=batch // replicas)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    strategy: Any = trainer.strategy
    plan = strategy.engine.partition.plan if layout is not None else None
    return {
        "moves": rebalancing.moves,
        "losses": watching.losses,
        "seconds": watching.seconds,
        "last": median(watching.seconds[-4:]),
        "first": median(watching.seconds[:4]),
        "weights": weights(trainer, module),
        "cuts": plan.cuts if plan is not None else None,
        "places": plan.model.places if plan is not None else None,
        "logged": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }
