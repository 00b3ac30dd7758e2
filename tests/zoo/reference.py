"""Trains one case in one process or under a layout, and compares the two.

Three SGD steps on the same global batches. Replica r of n reads the samples r, r + n, … of the order of the user's own
sampler. With 1/n of the batch size a replica, the union of the replicas' batches is the batch of a single process.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from tests.zoo.case import BATCH_SIZE, STEPS, Case, Samples
from tests.zoo.cases import CASES

SEED = 7
"""Of the weights."""
UPDATE_TOLERANCE = 1e-3
"""Largest relative error of a parameter's update after the three steps."""
VALUE_TOLERANCE = 1e-5
"""Largest relative error of a loss or a logged value."""
NEGLIGIBLE = 1e-2
"""An update is measured against at least this part of the model's median one (root mean square an element): the
gradient of a key bias is zero but for rounding, and the relative error of rounding is meaningless."""
SPACING = torch.finfo(torch.float32).eps
"""Relative spacing of float32 numbers: no weight can hold its update more finely than that, so it is no error."""


@dataclass
class Run:
    """What one rank saw of a training."""

    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights before the first step; on ranks other than 0 empty."""
    final: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights after the last step; on ranks other than 0 empty."""
    losses: list[float] = field(default_factory=list)
    """What `training_step` returned to the loop, of this rank's replica."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """`trainer.callback_metrics` after each step, and after the end."""


class Recorder(L.Callback):
    """Fills a `Run` as the training goes."""

    def __init__(self) -> None:
        self.run = Run()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the initial weights."""
        self.run.initial = full_state(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Take the loss and what a callback sees of the logged values."""
        self.run.losses.append(float(outputs["loss"]))
        self.run.metrics.append(_values(trainer.callback_metrics))


def full_state(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    """All weights under their own names; collective."""
    strategy: Any = trainer.strategy
    if hasattr(strategy, "full_state_dict"):
        state = strategy.full_state_dict()
    else:
        state = strategy.lightning_module.state_dict() if trainer.is_global_zero else {}
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def run_single(case: Case, *, validate: bool = False) -> Run:
    """Train in this process."""
    return _train(case, "auto", devices=1, replicas=1, validate=validate)


def run_hybrid(
    name: str, layout: str, schedule: Any = "1F1B", microbatches: int | Literal["auto"] = 4, *, validate: bool = False
) -> Run:
    """Train a case under a layout; called on every rank."""
    from lightning_hybrid import HybridStrategy, Layout

    parsed = Layout.parse(layout)
    strategy = HybridStrategy(layout=layout, schedule=schedule, microbatches=microbatches)
    return _train(CASES[name], strategy, devices=parsed.devices, replicas=parsed.replicas, validate=validate)


def run_ddp(name: str, devices: int) -> Run:
    """Train a case under Lightning's own DDPStrategy; called on every rank. Shows that the comparison is fair."""
    strategy = DDPStrategy(find_unused_parameters=True)
    return _train(CASES[name], strategy, devices=devices, replicas=devices)


def _train(case: Case, strategy: Any, *, devices: int, replicas: int, validate: bool = False) -> Run:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # As on the ranks: a QR decomposition, and so orthogonal initial weights, depends on it.
    L.seed_everything(SEED, verbose=False)
    module = case.build()
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1 if validate else 0,
    )
    data = Samples(case.sample, STEPS * BATCH_SIZE)
    size = BATCH_SIZE // replicas
    # Lightning's own strategies shuffle a sequential loader, unless it brings a distributed sampler.
    ddp = isinstance(strategy, DDPStrategy)
    order = DistributedSampler(data, replicas, int(os.environ["RANK"]), shuffle=False) if ddp else None
    validation = DataLoader(Samples(case.sample, BATCH_SIZE, seed=2), batch_size=size) if validate else None
    trainer.fit(module, DataLoader(data, batch_size=size, sampler=order), validation)
    recorder.run.final = full_state(trainer)
    recorder.run.metrics.append(_values(trainer.callback_metrics))
    return recorder.run


def _values(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


@dataclass(frozen=True)
class Comparison:
    """How far a run under a layout is from the single process."""

    update_error: float
    """max over parameters of ||dW - dW_single|| / ||dW_single||; infinite where there is nothing to compare."""
    worst: str
    """The parameter with the largest error."""
    problems: tuple[str, ...]
    """Everything that is wrong, in words; empty for an exact result."""


def compare(single: Run, ranks: list[Run], *, check_metrics: bool = True) -> Comparison:
    """Compare weights, losses and logged values."""
    problems: list[str] = []
    first = ranks[0]
    if missing := sorted(set(single.final) ^ set(first.final)):
        problems.append(f"names of the full state differ: {missing[:5]}")
    common = [name for name in single.final if name in first.final]
    unequal = [name for name in common if not torch.equal(single.initial[name], first.initial[name])]
    if unequal:
        problems.append(f"initial weights differ: {len(unequal)} of {len(common)}, first {unequal[0]}")
    errors = update_errors(single, first, common)
    worst = max(errors, key=lambda name: errors[name], default="")
    update_error = errors.get(worst, float("inf"))
    if not update_error <= UPDATE_TOLERANCE:
        wrong = [name for name, error in errors.items() if not error <= UPDATE_TOLERANCE]
        problems.append(f"update of {len(wrong)} of {len(errors)} differs, worst {worst}: {update_error:.1e}")
    if any(run.final for run in ranks[1:]):
        problems.append("full state is not empty on ranks other than 0")
    problems += _loss_problems(single, ranks)
    if check_metrics:
        problems += _metric_problems(single, ranks)
    return Comparison(update_error, worst, tuple(problems))


def update_sizes(run: Run) -> dict[str, float]:
    """Root mean square of the update an element, by parameter or buffer."""
    return {
        name: _rms(final.double() - run.initial[name].double())
        for name, final in run.final.items()
        if final.is_floating_point()
    }


def update_errors(single: Run, other: Run, names: list[str]) -> dict[str, float]:
    """Relative error of the update by parameter or buffer."""
    sizes = update_sizes(single)
    floor = NEGLIGIBLE * statistics.median([size for size in sizes.values() if size > 0] or [0.0])
    errors = {}
    for name in [name for name in names if name in sizes]:
        if single.final[name].shape != other.final[name].shape:
            errors[name] = math.inf
            continue
        # Both start from the same weights, so the difference of the updates is that of the final weights.
        difference = _rms(other.final[name].double() - single.final[name].double())
        beyond_spacing = max(0.0, difference - SPACING * _rms(single.initial[name].double()))
        errors[name] = beyond_spacing / max(sizes[name], floor) if beyond_spacing else 0.0
    return errors


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


def _loss_problems(single: Run, ranks: list[Run]) -> list[str]:
    steps = [len(run.losses) for run in ranks]
    if set(steps) != {len(single.losses)}:
        return [f"steps differ: {steps} instead of {len(single.losses)}"]
    for step, expected in enumerate(single.losses):
        mean = sum(run.losses[step] for run in ranks) / len(ranks)
        if not _close(mean, expected):
            return [f"loss of step {step}: mean over ranks {mean:.7f}, single process {expected:.7f}"]
    return []


def _metric_problems(single: Run, ranks: list[Run]) -> list[str]:
    for rank, run in enumerate(ranks):
        for step, (values, expected) in enumerate(zip(run.metrics, single.metrics, strict=True)):
            if values.keys() != expected.keys():
                return [f"callback_metrics on rank {rank}, step {step}: {sorted(values)}, not {sorted(expected)}"]
            for name, value in values.items():
                if not _close(value, expected[name]):
                    return [
                        f"callback_metrics[{name!r}] on rank {rank}, step {step}: {value:.7f}, not {expected[name]:.7f}"
                    ]
    return []


def _close(value: float, expected: float) -> bool:
    return abs(value - expected) <= VALUE_TOLERANCE * max(1.0, abs(expected))
