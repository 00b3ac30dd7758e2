"""One training of the headline benchmark: an arm, a seed, a learning rate; its validation curve, time and memory."""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
import time
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lightning_hybrid import HybridStrategy, Layout
from lightning_hybrid.data.text import read_bytes, stdlib_modules, stdlib_sources
from lightning_hybrid.models import CausalLM, OptimizerConfig, StreamsConfig, TransformerConfig
from lightning_hybrid.models.optimizers import learning_rate_share
from tests.benchmarks.contest import keep_to_own_cores
from tests.benchmarks.memory import peak_growth

VALIDATION = ("email", "logging", "statistics")
"""Packages of the standard library that no arm trains on."""
LEFT_OUT = ("encodings", "pydoc_data", "test")
"""Character maps, one file of help topics, tests with generated data."""
_MEASURED_STEPS = 4
_STREAMS_SHARE = 0.02
_WARMUP_SHARE, _DECAY_SHARE = 0.05, 0.5
"""Of each arm's own tokens. Runs as short as these gain from a long decay; every arm has the same."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every arm gets."""

    context: int
    batch_tokens: int
    """Tokens of a global batch."""
    steps: int
    """Batches of that size; all arms see so many tokens, whatever their batches."""
    evaluations: int
    """Validations, evenly spaced in tokens; the last at the end."""
    validation_windows: int
    packages: bool = False
    """Train on the sources of installed packages too."""
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens of a training."""
        return self.batch_tokens * self.steps


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    about: str
    transformer: TransformerConfig
    layout: str
    """A layout of `HybridStrategy`; `"ddp2"` for Lightning's own DDPStrategy."""
    optimizer: str = "adamw"
    moments: str = "float32"
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    microbatch_share: float = 1.0
    """A batch is accumulated from parts of this share of the global batch."""
    ramp: float = 0.0
    """Share of the tokens in which every part is a batch by itself: the batch schedule starts small."""
    streams: int = 1
    """Parallel streams in the last `_STREAMS_SHARE` of the tokens."""
    token_share: float = 1.0
    """Share of the budget that it trains for."""
    recompute: Literal["selective", "full"] | None = None
    """What the backward pass computes again."""
    precision: str = "32-true"

    def microbatch_tokens(self, budget: Budget) -> int:
        """Tokens of what is run at once, on all devices."""
        return round(budget.batch_tokens * self.microbatch_share)

    def batches(self, budget: Budget) -> tuple[int, int]:
        """Microbatches with one stream, so many that the last validation is at the end; and with several streams."""
        total = round(budget.tokens * self.token_share) // self.microbatch_tokens(budget)
        later = 0 if self.streams == 1 else max(1, round(total * _STREAMS_SHARE))
        return max(1, (total - later) // budget.evaluations) * budget.evaluations, later

    @property
    def ddp(self) -> bool:
        """Whether Lightning's own DDPStrategy runs it."""
        return self.layout.startswith("ddp")

    @property
    def devices(self) -> int:
        """Processes."""
        return int(self.layout[3:]) if self.ddp else Layout.parse(self.layout).devices


@dataclass
class Result:
    """What came of a training."""

    learning_rate: float
    seed: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """Tokens, seconds of training (without validation), validation loss in bits per byte."""
    parameters: int = 0

    @property
    def bits(self) -> float:
        """At the end."""
        return self.curve[-1][2]

    @property
    def seconds(self) -> float:
        """Of the whole training."""
        return self.curve[-1][1]


class Windows(Dataset):
    """Windows of a text, at starts that a seed draws, or evenly spaced."""

    def __init__(self, text: Tensor, context: int, count: int, seed: int | None) -> None:
        last = len(text) - context - 1
        if seed is None:
            self._starts = torch.linspace(0, last, count).long()
        else:
            self._starts = torch.randint(last, (count,), generator=torch.Generator().manual_seed(seed))
        self._text, self._context = text, context

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = int(self._starts[index])
        window = self._text[start : start + self._context + 1].long()
        return window[:-1], window[1:]


@cache
def texts(packages: bool) -> tuple[Tensor, Tensor]:
    """Training and validation text: whole packages apart, no file twice."""
    local = stdlib_sources(VALIDATION)
    files = stdlib_sources([m for m in stdlib_modules() if m not in {*VALIDATION, *LEFT_OUT}])
    if packages:
        files += sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    seen = {hashlib.sha256(path.read_bytes()).digest() for path in local}
    kept = []
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(path)
    return read_bytes(kept), read_bytes(local)


class Model(CausalLM):
    """The model as a user has it, with a learning rate by tokens, since arms differ in what a step is."""

    def __init__(self, arm: Arm, budget: Budget, learning_rate: float) -> None:
        optimizer = OptimizerConfig(
            name=arm.optimizer,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            moments=arm.moments,  # type: ignore[arg-type]
            schedule="stable",
            warmup_steps=max(1, round(_WARMUP_SHARE * budget.steps * arm.token_share)),
            decay_share=_DECAY_SHARE,
        )
        super().__init__(arm.transformer, optimizer)
        self.budget, self.tokens = budget, 0
        self.total_tokens = sum(arm.batches(budget)) * arm.microbatch_tokens(budget)

    def configure_optimizers(self) -> Any:
        """As CausalLM, with the schedule of `budget.batch_tokens` a step."""
        configured: Any = super().configure_optimizers()
        config, batch = self.optimizer_config, self.budget.batch_tokens
        self._total_steps = total_steps = self.total_tokens // batch
        scheduler = configured["lr_scheduler"]["scheduler"]
        scheduler.lr_lambdas = [lambda _: learning_rate_share(self.tokens // batch, config, total_steps)] * len(
            scheduler.lr_lambdas
        )
        return configured


class Clock(L.Callback):
    """Counts tokens and time, changes the batch, keeps the curve."""

    def __init__(self, arm: Arm, budget: Budget, result: Result) -> None:
        self.result, self._microbatch = result, arm.microbatch_tokens(budget)
        self._accumulated = budget.batch_tokens // self._microbatch
        self._ramp_tokens = arm.ramp * budget.tokens * arm.token_share
        self._cuda = budget.device == "cuda"
        self._seconds, self._since = 0.0, 0.0

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.result.parameters = sum(p.numel() for p in pl_module.parameters())
        self._since = self._now()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.tokens >= self._ramp_tokens and batch_idx % self._accumulated == 0:
            trainer.accumulate_grad_batches = self._accumulated
        pl_module.tokens += self._microbatch

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._seconds += self._now() - self._since

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        bits = float(trainer.callback_metrics["val_bits_per_byte"])
        self.result.curve.append((pl_module.tokens, self._seconds, bits))
        self._since = self._now()


def train(arm: Arm, budget: Budget, learning_rate: float, seed: int) -> Result:
    """Trains; runs on every rank, and the result of rank 0 counts."""
    _prepare()
    return _fit(arm, budget, learning_rate, seed)


def peak_memory(arm: Arm, budget: Budget) -> int:
    """Bytes of this rank at the peak of some steps: growth of the resident set, or what CUDA's allocator handed out.

    By itself, in fresh processes: giving all memory back at once, so that the resident set is what is in use, costs
    time.
    """
    _prepare()
    learning_rate, short = arm.learning_rates[0], replace(budget, steps=_MEASURED_STEPS, evaluations=1)
    if budget.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _fit(arm, short, learning_rate, 0)
        return torch.cuda.max_memory_allocated()
    return peak_growth(lambda: _fit(arm, short, learning_rate, 0), lambda: _fit(arm, short, learning_rate, 0))


def _prepare() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_to_own_cores()


def _fit(arm: Arm, budget: Budget, learning_rate: float, seed: int) -> Result:
    L.seed_everything(seed, verbose=False)
    training, validation = texts(budget.packages)
    result, model = Result(learning_rate, seed), Model(arm, budget, learning_rate)
    clock = Clock(arm, budget, result)
    devices, microbatch = arm.devices, arm.microbatch_tokens(budget) // budget.context
    train_data = Windows(training, budget.context, model.total_tokens // budget.context, seed)
    val_data = Windows(validation, budget.context, budget.validation_windows, None)
    first, later = arm.batches(budget)
    for start, batches in ((0, first), (first, later)):
        if not batches:
            continue
        if start:
            model.transformer.open_streams(StreamsConfig(count=arm.streams))
        part = Subset(train_data, range(start * microbatch, (start + batches) * microbatch))
        os.environ["WORLD_SIZE"] = str(devices)  # Lightning's teardown has changed it
        trainer = L.Trainer(
            strategy=DDPStrategy() if arm.ddp else HybridStrategy(layout=arm.layout, recompute=arm.recompute),
            accelerator=budget.device,
            devices=devices,
            precision=arm.precision,  # type: ignore[arg-type]
            max_epochs=1,
            max_steps=batches,
            limit_train_batches=batches,
            val_check_interval=min(batches, first // budget.evaluations),
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        evaluated = min(budget.validation_windows, 32)
        trainer.fit(model, _loader(arm, part, microbatch), _loader(arm, val_data, evaluated))
    return result


def _loader(arm: Arm, data: Dataset, size: int) -> DataLoader:
    replicas = arm.devices if arm.ddp else Layout.parse(arm.layout).replicas
    sampler = DistributedSampler(data, replicas, int(os.environ["RANK"]), shuffle=False) if arm.ddp else None
    return DataLoader(data, batch_size=size // replicas, sampler=sampler, drop_last=True)
