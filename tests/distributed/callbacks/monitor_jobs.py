"""Runs with `HybridMonitor`: each returns what loggers have got on a rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import grad_norm
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_hybrid import HybridStrategy
from lightning_hybrid.adapt.batch_size import DecisionRules
from lightning_hybrid.callbacks import (
    AdaptiveBatchSize,
    BatchSizeSchedule,
    HybridMonitor,
    LoadRebalancing,
    Phase,
    PhaseSchedule,
    RebalancingRules,
)
from lightning_hybrid.callbacks import monitor as monitor_module
from tests.distributed.callbacks.rebalancing_jobs import Sleeper
from tests.distributed.checkpoint.wandb_jobs import offline
from tests.distributed.contract.jobs import make_trainer, start
from tests.distributed.contract.modules import Memory
from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import Numbers

TIME, WIDTH, BATCH = 8, 32, 16
SLOW_SECONDS = 0.05
PEAK_TFLOPS = 0.5


class Tokens(Dataset):
    """Windows of tokens; each sample takes some time to read."""

    def __init__(self, samples: int, seconds: float = 0.0) -> None:
        self._tokens = torch.randint(32, (samples, TIME), generator=torch.Generator().manual_seed(0))
        self._seconds = seconds

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self._seconds)
        return self._tokens[index]


class SlowBlock(nn.Module):
    """A block that takes its time in the forward pass on some ranks."""

    def __init__(self, ranks: tuple[int, ...], seconds: float = SLOW_SECONDS) -> None:
        super().__init__()
        self.linear, self._ranks, self._seconds = nn.Linear(WIDTH, WIDTH), ranks, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._ranks and dist.is_initialized() and dist.get_rank() in self._ranks:
            time.sleep(self._seconds)
        return torch.tanh(self.linear(x))


class Words(L.LightningModule):
    """Predicts tokens. Given ranks run the last block slowly, or all ranks run the first and the last stage slowly."""

    def __init__(
        self,
        slow_ranks: tuple[int, ...] = (),
        checkpointing: bool = False,
        slow_stages: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        slow = {0: (0,), 3: (1,)} if slow_stages else {3: slow_ranks}
        seconds = slow_stages or SLOW_SECONDS
        self.blocks = nn.ModuleList(SlowBlock(slow.get(block, ()), seconds) for block in range(4))
        self.head = nn.Linear(WIDTH, 32)
        self._checkpointing = checkpointing

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            again = self._checkpointing
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if again else block(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    layout: str,
    slow_ranks: tuple[int, ...] = (),
    seconds_per_sample: float = 0.0,
    monitor: dict[str, Any] | None = None,
    checkpointing: bool = False,
    compiled: bool = False,
    slow_stages: float = 0.0,
    microbatches: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains 8 steps, of which every fourth is logged; the lines of the logger with values of the monitor."""
    start()
    memory, callback = Memory(), HybridMonitor(**(monitor or {}))
    defaults: dict[str, Any] = {"max_steps": 8, "log_every_n_steps": 4}
    if compiled:
        defaults["strategy"] = HybridStrategy(layout, compile=True)
    if microbatches is not None:
        defaults["strategy"] = HybridStrategy(layout, microbatches=microbatches)
    trainer, n = make_trainer(layout, logger=memory, callbacks=[callback], **{**defaults, **options})
    with patch.object(monitor_module, "rank_zero_info") as told:
        module = Words(slow_ranks, checkpointing, slow_stages)
        trainer.fit(module, DataLoader(Tokens(128, seconds_per_sample), batch_size=BATCH // n))
    compiling = [call for call in told.call_args_list if "compiled" in call.args[0]]
    lines = [{"step": step, **line} for step, line in memory.lines if "layout/pp" in line]
    return {"lines": lines, "bubble": trainer.strategy.plan.bubble, "values": callback.values, "told": len(compiling)}  # type: ignore[attr-defined]


class Norms(L.Callback):
    """Keeps the norm of the gradients of each step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.norms.append(float(grad_norm(pl_module, 2)["grad_2.0_norm_total"]))


def of_one_process() -> dict[str, Any]:
    """The norm of the gradients of each step, and the operations for a sample, by torch's own counter."""
    start()
    norms, module = Norms(), Words()
    trainer, _ = make_trainer(None, callbacks=[norms], max_steps=8)
    trainer.fit(module, DataLoader(Tokens(128), batch_size=BATCH))
    module.log = lambda *_: None  # type: ignore[method-assign, assignment]
    with FlopCounterMode(display=False) as counter:
        module.training_step(Tokens(BATCH)._tokens, 0).backward()
    return {"norms": norms.norms, "flops": counter.get_total_flops() / BATCH}


def changing(layout: str, folder: Path) -> dict[str, Any]:
    """Trains in two layouts with W&B (offline), TensorBoard and CSV; the last values, on each rank."""
    start()
    loggers = [
        WandbLogger(save_dir=folder, project="test"),
        TensorBoardLogger(folder, "tensorboard", "0"),
        CSVLogger(folder, "csv", "0"),
    ]
    callback = HybridMonitor(peak_tflops=PEAK_TFLOPS)
    phases = PhaseSchedule([Phase(), Phase(at_step=6, layout="dp2" if layout != "dp2" else "pp2")])
    options: dict[str, Any] = {"max_steps": 12, "log_every_n_steps": 2}
    trainer, n = make_trainer(layout, logger=loggers, callbacks=[callback, phases], **options)
    with offline():
        trainer.fit(Words(), DataLoader(Tokens(256), batch_size=BATCH // n))
    return callback.values


def experts(folder: Path) -> dict[str, Any]:
    """Trains experts on two ranks with W&B (offline), and with a callback that reads their load at other steps."""
    start()
    callback, loads = HybridMonitor(), Loads()
    logger = WandbLogger(save_dir=folder, project="test")
    options: dict[str, Any] = {"max_steps": 8, "log_every_n_steps": 4, "max_epochs": -1}
    trainer, n = make_trainer("ep2", logger=logger, callbacks=[callback, loads], **options)
    with offline():
        trainer.fit(Mixture(), DataLoader(Numbers(), batch_size=BATCH // n))
    return {"values": callback.values, "loads": callback.expert_loads, "read": loads.read}


class Loads(L.Callback):
    """Reads the load of experts after every third step."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 3 == 0:
            self.read.append(sum(int(x.sum()) for x in trainer.strategy.expert_loads().values()))  # type: ignore[attr-defined]


def resized(folder: Path) -> list[dict[str, Any]]:
    """Trains with a batch size that doubles after two steps, with W&B (offline); the changes."""
    start()
    adaptive = AdaptiveBatchSize(statistics=None, schedule=BatchSizeSchedule(points={0: BATCH, 2 * BATCH: 2 * BATCH}))
    logger = WandbLogger(save_dir=folder, project="test")
    options: dict[str, Any] = {"max_steps": 6, "log_every_n_steps": 2, "logger": logger}
    trainer, n = make_trainer("dp2", callbacks=[HybridMonitor(), adaptive], **options)
    with offline():
        trainer.fit(Words(), DataLoader(Tokens(256), batch_size=BATCH // n))
    return adaptive.events


def rebalanced(folder: Path) -> list[dict[str, Any]]:
    """Trains two replicas, one of which is slow, with W&B (offline); what was moved."""
    start()
    rules = RebalancingRules(every_n_steps=3, rest_looks=1, horizon_steps=10**6)
    rebalancing = LoadRebalancing(rules=rules, kinds=("replicas",))
    logger = WandbLogger(save_dir=folder, project="test")
    options: dict[str, Any] = {"max_steps": 12, "log_every_n_steps": 2, "logger": logger}
    trainer, n = make_trainer("dp2", callbacks=[HybridMonitor(), rebalancing], **options)
    with offline():
        module = Sleeper(2, 0.002, {1: 3.0}, by_sample=True)
        trainer.fit(module, DataLoader(Numbers(32 * 16), batch_size=32 // n))
    return rebalancing.moves


def noisy(layout: str) -> tuple[list[dict[str, float]], float | None]:
    """Trains with a measured noise scale; the lines of the logger, and the noise scale at the end."""
    start()
    memory = Memory()
    adaptive = AdaptiveBatchSize(rules=DecisionRules(every_n_steps=10**9, measure_every_n_steps=1))
    options: dict[str, Any] = {"max_steps": 12, "log_every_n_steps": 4, "logger": memory}
    trainer, n = make_trainer(layout, callbacks=[adaptive, HybridMonitor()], accumulate_grad_batches=2, **options)
    trainer.fit(Words(), DataLoader(Tokens(512), batch_size=BATCH // n))
    return [line for _, line in memory.lines if "layout/pp" in line], adaptive.noise_scale
