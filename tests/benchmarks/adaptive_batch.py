"""What an adaptive batch size gains: `python -m tests.benchmarks.adaptive_batch [toy overhead text] [--seeds 0 1 2]`.

`toy`: a regression with noisy labels, Adam, a learning rate that falls with the samples (cosine), equally many samples
in every run. Time is virtual: a step of B samples takes 512 + B units, as if small batches did not saturate
the device. Every fixed batch has the learning rate times the square root of its growth, as the adaptive one has.

`overhead`: steps with the statistics and without, block by block in one training.

`text`: the quickstart, with its batch and with an adaptive one: time to the final bits per byte of the fixed batch.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hybrid import HybridStrategy
from lightning_hybrid.callbacks import AdaptiveBatchSize, DecisionRules
from lightning_hybrid.data import StdlibText
from lightning_hybrid.models import CausalLM
from lightning_hybrid.models.config import OptimizerConfig, TransformerConfig
from tests.benchmarks import safety
from tests.benchmarks.contestants import SEED
from tests.benchmarks.overhead import TIMEOUT_SECONDS, versions
from tests.benchmarks.safety import Switched
from tests.harness import RankGroup

SAMPLES = 600_000
FIRST, FIXED = 128, (128, 256, 512, 1024, 2048)
NOISE = 2.0
"""Standard deviation of the labels' noise over that of the labels themselves."""
LEARNING_RATE = 5e-3
"""At the first batch size, where 1e-3, 3e-3 and 1e-2 are worse."""
FIXED_COST = 512
"""Samples whose time a step takes beside its own."""
OVERHEAD_BOUND = 1.02
OVERHEAD_LAYOUTS = ("dp2", "fsdp2", "pp2")
"""Without accumulation a step under `tp` alone is one part, which the statistics cannot compare."""
TEXT_SAMPLES, TEXT_BATCH = 8000, 16
"""The quickstart's: 500 steps of 16 windows."""


# ---- a regression with noisy labels


class Regression(L.LightningModule):
    """A small network learns another one, from labels with noise.

    Args:
        batch_size: Samples of a step of the optimizer.
        scaled: Whether the learning rate is scaled here: for fixed batches.
    """

    def __init__(self, batch_size: int, scaled: bool) -> None:
        super().__init__()
        self.net = network()
        growth = batch_size / FIRST if scaled else 1.0
        self._rate, self._steps = LEARNING_RATE * math.sqrt(growth), SAMPLES // batch_size
        self.batch_sizes: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean squared error of a batch."""
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        """Adam and half a cosine."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self._rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self._steps))
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def network() -> nn.Sequential:
    """Of the student and of the teacher."""
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


class Rows:
    """Tensors that are read a batch at once, since reading them one by one would take most of the time."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        """All of a batch."""
        index = torch.tensor(rows)
        return [t[index] for t in self._tensors]


def whole(batch: list[Tensor]) -> list[Tensor]:
    """Put together already."""
    return batch


@dataclass(frozen=True)
class Course:
    """A run of the toy."""

    excess_loss: float
    """Mean squared distance from the labels without noise, on fresh rows."""
    virtual_time: float
    """In steps of the first batch size."""
    steps: int
    final_batch_size: int


class Sizes(L.Callback):
    """The batch size of every step."""

    def __init__(self, adaptive: AdaptiveBatchSize | None, fixed: int) -> None:
        self._adaptive, self._fixed = adaptive, fixed
        self.found: list[int] = []

    def on_train_start(self, *_: Any) -> None:
        """The launcher has shared out the cores; more of them make so small a network slower."""
        torch.set_num_threads(1)

    def on_before_optimizer_step(self, *_: Any) -> None:
        """A step is made."""
        self.found.append(self._fixed if self._adaptive is None else self._adaptive.batch_size)


def train(seed: int, batch_size: int, adaptive: bool) -> Course:
    """One run; adaptive ones begin with `batch_size`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    teacher = network().requires_grad_(False)
    x, fresh = torch.randn(SAMPLES, 16), torch.randn(20_000, 16)
    clean = teacher(x)
    y = clean + NOISE * clean.std() * torch.randn_like(clean)
    module = Regression(batch_size, scaled=not adaptive)
    callback = AdaptiveBatchSize(statistics="norm", learning_rate="sqrt") if adaptive else None
    sizes = Sizes(callback, batch_size)
    parts = 2 if adaptive else 1  # the gradients of two halves of a batch are compared
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=HybridStrategy(layout="dp1"),
        max_epochs=1,
        accumulate_grad_batches=parts,
        callbacks=[sizes] if callback is None else [callback, sizes],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = Rows(x, y)
    trainer.fit(module, DataLoader(data, batch_size=batch_size // parts, collate_fn=whole, drop_last=True))
    with torch.no_grad():
        excess = ((module.net(fresh) - teacher(fresh)).square().mean() / clean.var()).item()
    virtual = sum(FIXED_COST + b for b in sizes.found) / (FIXED_COST + FIRST)
    return Course(excess, virtual, len(sizes.found), sizes.found[-1])


def toy(seeds: Sequence[int]) -> dict[str, list[Course]]:
    """All runs, by name, one for each seed."""
    runs = {f"fixed {b}": [train(seed, b, adaptive=False) for seed in seeds] for b in FIXED}
    return {**runs, f"adaptive from {FIRST}": [train(seed, FIRST, adaptive=True) for seed in seeds]}


def toy_table(runs: dict[str, list[Course]]) -> str:
    """The runs as a markdown table of medians over seeds."""
    lines = [
        "| batch | excess loss | relative to the first | virtual time | relative to the first | steps | last batch |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    loss, time_ = medians(runs[f"fixed {FIRST}"])
    for name, courses in runs.items():
        own_loss, own_time = medians(courses)
        lines.append(
            f"| {name} | {own_loss:.4f} | {own_loss / loss:.3f} | {own_time:.0f} | {own_time / time_:.3f} "
            f"| {statistics.median(c.steps for c in courses):.0f} "
            f"| {statistics.median(c.final_batch_size for c in courses):.0f} |"
        )
    return "\n".join(lines)


def medians(courses: Sequence[Course]) -> tuple[float, float]:
    """Excess loss and virtual time."""
    return statistics.median(c.excess_loss for c in courses), statistics.median(c.virtual_time for c in courses)


def best_fixed_time(runs: dict[str, list[Course]]) -> float:
    """Virtual time of the fastest fixed batch whose loss is not above the adaptive run's."""
    loss, _ = medians(runs[f"adaptive from {FIRST}"])
    return min(t for name, c in runs.items() if name.startswith("fixed") for own, t in [medians(c)] if own <= loss)


# ---- the cost of the statistics


class Switchable(AdaptiveBatchSize):
    """Its statistics can be switched off; it never changes the batch."""

    def __init__(self) -> None:
        super().__init__(rules=DecisionRules(every_n_steps=10**9))
        self.on = True

    def interceptor(self, on: bool) -> None:
        """Puts the hooks on, or takes them off."""
        control = self._batches
        if control.noise is not None and not on:
            control.stop_measuring()
        elif on:
            control.measure_noise()
        self.on = on

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Only where they are on."""
        if self.on:
            super().on_before_optimizer_step(*args)


class Measuring(Switched):
    """Its statistics are what is switched."""

    def setup(self, trainer: L.Trainer) -> None:
        """As ever."""
        HybridStrategy.setup(self, trainer)

    def callbacks(self) -> list[L.Callback]:
        """What measures."""
        self.adaptive = Switchable()
        return [self.adaptive]

    @property
    def checks(self) -> bool:
        """Whether they are on."""
        return self.adaptive.on

    @checks.setter
    def checks(self, on: bool) -> None:
        if "adaptive" in vars(self):  # not yet while it is made
            self.adaptive.interceptor(on)


# ---- the quickstart's text


class Clock(L.Callback):
    """Seconds of training steps, and what validation finds after so many."""

    def __init__(self) -> None:
        self.seconds, self._begun = 0.0, 0.0
        self.found: list[tuple[float, int, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A batch begins."""
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A batch ends."""
        self.seconds += time.perf_counter() - self._begun

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Something was found."""
        value = float(trainer.callback_metrics["val_bits_per_byte"])
        self.found.append((self.seconds, trainer.global_step, value))


def text_table(samples: int, batch_size: int) -> str:
    """Both runs as a markdown table."""
    lines = ["| batch | seconds to the fixed run's bits per byte | final bits per byte | steps | total seconds |"]
    lines.append("|---|---|---|---|---|")
    with RankGroup(2, timeout_seconds=TIMEOUT_SECONDS) as ranks:
        runs = {
            f"fixed {batch_size}": ranks.call(text, batch_size, False, samples)[0],
            f"adaptive from {batch_size}": ranks.call(text, batch_size, True, samples)[0],
        }
    target = runs[f"fixed {batch_size}"][-1][2]
    for name, found in runs.items():
        reached = next((f"{seconds:.1f}" for seconds, _, bits in found if bits <= target), "not reached")
        seconds, steps, bits = found[-1]
        lines.append(f"| {name} | {reached} | {bits:.3f} | {steps} | {seconds:.1f} |")
    return "\n".join(lines)


def text(batch_size: int, adaptive: bool, samples: int) -> list[tuple[float, int, float]]:
    """The quickstart's model and data on two replicas: seconds, steps and bits per byte. Runs on every rank."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(SEED, verbose=False)
    module = CausalLM(
        TransformerConfig(width=128, blocks=4, heads=4, context_length=128),
        OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    )
    clock = Clock()
    callbacks: list[L.Callback] = [clock]
    if adaptive:
        callbacks.insert(0, AdaptiveBatchSize(learning_rate="sqrt", max_samples=samples))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=HybridStrategy(layout="dp2"),
        max_steps=samples // batch_size,
        gradient_clip_val=1.0,
        val_check_interval=50,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=StdlibText(batch_size=batch_size, context_length=128))
    return clock.found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is asked for and prints the tables."""
    parser = argparse.ArgumentParser(description="What an adaptive batch size gains.")
    parser.add_argument("parts", nargs="*", choices=["toy", "overhead", "text"], default=["toy", "overhead", "text"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="of the toy")
    parser.add_argument("--rounds", type=int, default=40, help="pairs of blocks of the overhead")
    options = parser.parse_args(arguments)
    print(f"{versions()}\n")
    if "toy" in options.parts:
        runs = toy(options.seeds)
        print(f"seeds {options.seeds}\n\n{toy_table(runs)}\n")
        print(f"against the best fixed batch: {medians(list(runs.values())[-1])[1] / best_fixed_time(runs):.3f}\n")
    if "overhead" in options.parts:
        costs = safety.run(OVERHEAD_LAYOUTS, options.rounds, 4, kind=Measuring)
        print(f"{safety.table(costs, 'statistics', OVERHEAD_BOUND)}\n")
    if "text" in options.parts:
        print(f"{text_table(TEXT_SAMPLES, TEXT_BATCH)}\n")


if __name__ == "__main__":
    main()
