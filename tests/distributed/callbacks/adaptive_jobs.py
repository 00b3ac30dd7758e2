"""Runs with `AdaptiveBatchSize`, and what one process computes in their place; they run on every rank."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any
from unittest import mock

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hybrid.adapt.batch_size import DecisionRules
from lightning_hybrid.adapt.division import BatchDivision
from lightning_hybrid.adapt.gradient_noise import PartNorms, estimate
from lightning_hybrid.callbacks import AdaptiveBatchSize, BatchSizeSchedule
from lightning_hybrid.launch.failures import RankFailed
from lightning_hybrid.tuning import batch_size as batch_control
from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights

NEVER = DecisionRules(every_n_steps=10**9, measure_every_n_steps=1)
MODULES = {"Classifier": Classifier, "Mixture": Mixture}


class Estimates(L.Callback):
    """The estimates of every step, and how many parts they are of."""

    def __init__(self, adaptive: AdaptiveBatchSize) -> None:
        self._adaptive = adaptive
        self.found: list[tuple[float, float]] = []
        self.parts: list[list[int]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        noise = self._adaptive._batches.noise
        assert noise is not None
        self.found.append(estimate(noise.last, noise.batch_size))
        self.parts.append([p.parts for p in noise.last])


def noise(
    layout: str | None, kind: str = "Classifier", *, batch: int = 8, accumulate: int = 2, **options: Any
) -> dict[str, Any]:
    """S and G^2 of every step under a layout, and the weights after them."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = MODULES[kind]()
    adaptive = AdaptiveBatchSize(rules=NEVER)
    found = Estimates(adaptive)
    trainer, replicas = trainer_for(layout, accumulate_grad_batches=accumulate, callbacks=[adaptive, found], **options)
    trainer.fit(module, DataLoader(Numbers(48), batch_size=batch // replicas))
    return {"found": found.found, "parts": found.parts, "weights": weights(trainer, module)}


class Unfreeze(L.Callback):
    """The first block learns from the second epoch on."""

    def __init__(self, adaptive: AdaptiveBatchSize) -> None:
        self._adaptive = adaptive
        self.measured: list[int] = []

    def on_train_epoch_start(self, trainer, pl_module):
        blocks: Any = pl_module.blocks
        blocks[0].requires_grad_(trainer.current_epoch > 0)

    def on_train_epoch_end(self, trainer, pl_module):
        noise = self._adaptive._batches.noise
        assert noise is not None
        self.measured.append(len(noise._handles))


def measured_weights(layout: str) -> list[int]:
    """How many weights the statistics are of, in two epochs."""
    quiet()
    L.seed_everything(7, verbose=False)
    module: Any = Classifier()
    adaptive = AdaptiveBatchSize(rules=NEVER)
    module.blocks[0].requires_grad_(False)
    found = Unfreeze(adaptive)
    trainer, replicas = trainer_for(layout, callbacks=[adaptive, found], max_epochs=2)
    trainer.fit(module, DataLoader(Numbers(48), batch_size=16 // replicas))
    return found.measured


def noise_of_parts(
    replicas: int,
    microbatches: int,
    kind: str = "Classifier",
    *,
    batch: int = 8,
    accumulate: int = 2,
    group: int = 1,
) -> list[tuple[float, float]]:
    """The same from a gradient for every part, each of its own backward pass, in one process.

    Args:
        replicas: How many replicas there are.
        microbatches: Parts of a replica's batch.
        kind: The module.
        batch: Samples of all replicas that are run together.
        accumulate: Batches in a step.
        group: Replicas whose experts' gradients are one sum.
    """
    quiet()
    L.seed_everything(7, verbose=False)
    module: Any = MODULES[kind]()
    data, found = Numbers(48), []
    names = [n for n, _ in module.named_parameters()]
    for start in range(0, 48, batch * accumulate):
        parts: list[dict[str, torch.Tensor]] = []
        for i in range(accumulate):
            rows = torch.arange(start + i * batch, start + (i + 1) * batch)
            for r in range(replicas):
                for own in rows[r::replicas].chunk(microbatches):
                    loss = nn.functional.cross_entropy(module(data.x[own]), data.y[own])
                    parts.append(dict(zip(names, torch.autograd.grad(loss, module.parameters()), strict=True)))
        experts = {n for n in names if ".experts." in n and group > 1}
        found.append(
            estimate(
                [_norms(parts, [n for n in names if n not in experts], 1), _norms(parts, sorted(experts), group)],
                batch * accumulate,
            )
        )
        for name, parameter in module.named_parameters():
            parameter.data -= 0.1 * torch.stack([p[name] for p in parts]).mean(0)
    return found


def _norms(parts: list[dict[str, torch.Tensor]], names: list[str], group: int) -> PartNorms:
    """Of `names`, with the mean of `group` parts in a row as one part."""
    if not names:
        return PartNorms(parts=1, mean_of_squares=0.0, square_of_mean=0.0)
    flat = torch.stack([torch.cat([p[n].flatten() for n in names]) for p in parts]).double()
    flat = flat.unflatten(0, (-1, group)).mean(1)
    squares = flat.square().sum(1).mean()
    return PartNorms(parts=len(flat), mean_of_squares=float(squares), square_of_mean=float(flat.mean(0).square().sum()))


class Plan(L.Callback):
    """Changes how batches are divided, after given numbers of optimizer steps, and notes every step's gradient."""

    def __init__(self, divisions: Mapping[int, tuple[int, int, int]]) -> None:
        self._divisions = {k: _division(v) for k, v in divisions.items()}
        self.gradients: list[dict[str, torch.Tensor]] = []
        self._control: Any = None

    def on_train_start(self, trainer, pl_module):
        strategy: Any = trainer.strategy
        self._control = batch_control.BatchSizeController.start(strategy.engine, strategy.listeners)
        if 0 in self._divisions:
            self._control.change(self._divisions[0])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._control.before_batch(batch_idx)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        strategy: Any = trainer.strategy
        norms = strategy.gradient_norms()
        self.gradients.append({k: v.clone() for k, v in norms.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(self.gradients) in self._divisions and not trainer.fit_loop._should_accumulate():
            self._control.change(self._divisions[len(self.gradients)])

    def teardown(self, trainer, pl_module, stage):
        self._control.release()


def _division(sizes: tuple[int, int, int]) -> BatchDivision:
    return BatchDivision(batch_size=sizes[0], accumulate=sizes[1], microbatches=sizes[2])


def every_transition(most: int) -> list[int]:
    """Numbers from 1 to `most` in which each follows each, itself included, exactly once."""
    left = {a: list(range(1, most + 1)) for a in range(1, most + 1)}
    path, walk = [1], []
    while path:  # Hierholzer's algorithm
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            walk.append(path.pop())
    return walk[::-1]


def planned(layout: str | None, divisions: list[tuple[int, int, int]], samples: int, **options: Any) -> dict[str, Any]:
    """Gradient norms of every step, with step k divided as `divisions[k]`; weights after them; samples that were used.

    The last division stays.
    """
    quiet()
    L.seed_everything(7, verbose=False)
    module = Classifier()
    plan = Plan(dict(enumerate(divisions)))
    loader_options = options.pop("loader_options", {})
    trainer, replicas = trainer_for(layout, callbacks=[plan], **options)
    trainer.fit(module, DataLoader(Numbers(samples), batch_size=4 // replicas, **loader_options))
    return {
        "gradients": plan.gradients,
        "weights": weights(trainer, module),
        "batches": trainer.fit_loop.epoch_loop.batch_progress.total.ready,
    }


def of_one_process(steps: list[int], samples: int) -> dict[str, Any]:
    """The same for steps of so many samples, each in one pass; the last size stays."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, data = Classifier(), Numbers(samples)
    used, found = 0, []
    while used < samples:
        size = steps[min(len(found), len(steps) - 1)]
        rows = slice(used, used + size)
        module.zero_grad()
        nn.functional.cross_entropy(module(data.x[rows]), data.y[rows]).backward()
        norms = {n: p.grad.norm() for n, p in module.named_parameters() if p.grad is not None}
        found.append({f"grad_2.0_norm/{n}": v for n, v in norms.items()})
        used += size
        for parameter in module.parameters():
            parameter.data -= 0.1 * parameter.grad  # type: ignore[operator] -- backward has just made it
    return {"gradients": found, "weights": module.state_dict()}


class Noisy(L.LightningModule):
    """A regression whose labels are mostly noise: small batches soon stop to help."""

    def __init__(self, optimizer: str = "adam", fits: dict[int, int] | None = None) -> None:
        super().__init__()
        self.fits, self.starts = fits, False
        """By rank: samples of a microbatch that its memory has room for; once the module is partitioned."""
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 1)
        self.optimizer = optimizer
        self.rates: list[float] = []

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x).squeeze(-1)

    def on_fit_start(self):
        self.starts = True

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.fits is not None and self.starts and len(x) > self.fits[torch.distributed.get_rank()]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return (self(x) - y).square().mean()

    def configure_optimizers(self):
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[self.optimizer]
        optimizer = kind(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 50))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def noisy_data(samples: int) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 8, generator=generator)
    y = x @ torch.randn(8, generator=generator) + 3 * torch.randn(samples, generator=generator)
    return torch.utils.data.TensorDataset(x, y)


class Course(L.Callback):
    """What every step was made with: batch size, and the learning rates inside and outside of the update."""

    def __init__(self, adaptive: AdaptiveBatchSize, module: Noisy) -> None:
        self._adaptive, self._module = adaptive, module
        self.steps: list[tuple[int, float]] = []
        self.epochs: list[int] = []
        self.division: BatchDivision | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        optimizer: Any = trainer.optimizers[0]
        if not hasattr(optimizer, "watched"):
            optimizer.watched = True
            optimizer.register_step_post_hook(lambda o, *_: self._module.rates.append(o.param_groups[0]["lr"]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate():
            self.steps.append((self._adaptive.batch_size, trainer.optimizers[0].param_groups[0]["lr"]))
            self.epochs.append(trainer.current_epoch)

    def on_train_end(self, trainer, pl_module):
        self.division = self._adaptive.division


class Switch(L.Callback):
    """Another layout after some steps of the optimizer."""

    def __init__(self, layouts: Mapping[int, str], **options: Any) -> None:
        self._layouts, self._options = dict(layouts), options

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layout = self._layouts.pop(trainer.global_step, None)
        if layout is not None:
            strategy: Any = trainer.strategy
            strategy.relayout(layout, **self._options)


def adapt(
    layout: str,
    *,
    layouts: Mapping[int, str] | None = None,
    relayout_options: dict[str, Any] | None = None,
    batch: int = 16,
    samples: int = 6400,
    shuffle: bool = False,
    optimizer: str = "adam",
    options: dict[str, Any] | None = None,
    rules: dict[str, Any] | None = None,
    save: str | None = None,
    save_at: int = 0,
    ckpt_path: str | None = None,
    stream: bool = False,
    scheduler: bool = False,
    fits: dict[int, int] | None = None,
    short_of_memory_at: tuple[int, ...] = (),
    **trainer_options: Any,
) -> dict[str, Any]:
    """A run with the callback: its changes, its steps, its weights."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Noisy(optimizer, fits)
    decisions = DecisionRules(
        **{"every_n_steps": 4, "measure_every_n_steps": 1, "half_life_steps": 10.0, **(rules or {})}
    )
    adaptive = AdaptiveBatchSize(rules=decisions, **{"learning_rate": "sqrt", **(options or {})})
    course = Course(adaptive, module)
    callbacks: list[L.Callback] = [adaptive, course]
    if layouts is not None:
        callbacks.append(Switch(layouts, **(relayout_options or {})))
    if save is not None:
        callbacks.append(SaveAt(save, save_at))
    if short_of_memory_at:
        callbacks.insert(0, ShortOfMemory(short_of_memory_at))
    if scheduler:
        callbacks.append(GradientAccumulationScheduler({0: 1}))
    trainer, replicas = trainer_for(layout, callbacks=callbacks, **trainer_options)
    data: Any = Unsized(noisy_data(samples)) if stream else noisy_data(samples)
    loader = DataLoader(data, batch_size=batch // replicas, shuffle=shuffle and not stream)
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=False)
    division: Any = course.division
    return {
        "microbatch_size": adaptive._microbatch.samples,
        "division": (division.batch_size, division.accumulate, division.microbatches),
        "events": adaptive.events,
        "steps": course.steps,
        "epochs": course.epochs,
        "rates": module.rates,
        "noise_scale": adaptive.noise_scale,
        "weights": weights(trainer, module),
        "samples": adaptive._present.samples,
        "logged": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }


def advice(layout: str, **options: Any) -> str:
    """What a run that ends without memory warns of."""
    ends = contextlib.suppress(torch.OutOfMemoryError, RankFailed)
    with mock.patch(f"{__name__}.quiet"), warnings.catch_warnings(record=True) as caught, ends:
        warnings.simplefilter("always")
        adapt(layout, **options)
    return "\n".join(str(w.message) for w in caught)


class Unsized(IterableDataset):
    """Samples one after the other."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __iter__(self):
        return (self._data[i] for i in range(len(self._data)))


class ShortOfMemory(L.Callback):
    """On rank 0, allocations are tried again in some steps, of which `AdaptiveBatchSize` warns."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self._steps, self._retries = steps, 0

    def on_train_start(self, trainer, pl_module):
        warnings.filterwarnings("ignore", "AdaptiveBatchSize: memory ran short")
        self._kept = batch_control.allocation_retries
        batch_control.allocation_retries = lambda device: self._retries

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 0 and trainer.global_step in self._steps:
            self._retries += 1

    def on_train_end(self, trainer, pl_module):
        batch_control.allocation_retries = self._kept


def scheduled(layout: str, schedule: dict[str, Any], samples: int) -> dict[str, Any]:
    """A run whose batch sizes are decided beforehand."""
    options = {"statistics": None, "schedule": BatchSizeSchedule(**schedule), "learning_rate": "sqrt"}
    return adapt(layout, samples=samples, options=options)


class SaveAt(L.Callback):
    """Saves after a step of the optimizer."""

    def __init__(self, path: str, step: int) -> None:
        self._path, self._step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self._step and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self._path)


def replayed(events: list[dict[str, int]], samples: int, first: int = 16) -> dict[str, Any]:
    """The run that those changes describe, in a plain loop of one process: Adam, learning rates by samples."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Noisy()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    data, used, scheduled, size, rates = noisy_data(samples), 0, 0, first, []
    sizes = {e["samples"]: e["to"] for e in events}
    while used < samples:
        size = sizes.get(used, size)
        batch = [t[used : used + size] for t in data.tensors]
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        rates.append(0.01 / (1 + scheduled // first / 50) * (size / first) ** 0.5)
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        used, scheduled = used + size, scheduled + size
    return {"rates": rates, "weights": module.state_dict()}
