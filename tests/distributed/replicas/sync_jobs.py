"""Ways to agree on gradients, by themselves and in runs; these run on every rank."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from lightning_hybrid.replicas.reduction import Exact, Hierarchical, InBfloat16, InBfloat16AddedExactly
from lightning_hybrid.spec.gradient_sync import GradientSync
from tests.distributed.callbacks.adaptive_jobs import SaveAt, Switch
from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights

REDUCTIONS: dict[str, Any] = {"exact": Exact, "bf16": InBfloat16, "bf16_fp32acc": InBfloat16AddedExactly}


def reduced(kind: str, elements: int, inner: int = 1, repetitions: int = 1) -> tuple[torch.Tensor, float]:
    """The sum of random tensors of all ranks, and its largest error over the norm of the tensors."""
    if not dist.is_initialized():  # as the first training does
        trainer, _ = trainer_for("dp4")
        trainer.fit(Classifier(), DataLoader(Numbers(4), batch_size=1))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    reduction = REDUCTIONS[kind]() if kind in REDUCTIONS else Hierarchical(*groups(inner))
    found, error, whole = torch.zeros(()), 0.0, dist.group.WORLD
    if whole is None:
        raise RuntimeError("The processes are not connected.")
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(repetition)
        values = [torch.randn(elements, generator=generator) for _ in range(ranks)]
        found = values[rank].clone()
        reduction.begin(found, whole)()
        exact = torch.stack(values).double()
        error = max(error, float((found - exact.sum(0)).norm() / exact.norm()))
    return found, error


_groups: dict[int, Any] = {}


def groups(inner: int) -> Any:
    if inner not in _groups:
        members = list(range(dist.get_world_size()))
        near = [members[i : i + inner] for i in range(0, len(members), inner)]
        far = [members[i::inner] for i in range(inner)]
        made = [[(m, dist.new_group(m)) for m in lists] for lists in (near, far)]
        _groups[inner] = tuple(next(g for m, g in way if dist.get_rank() in m) for way in made)
    return _groups[inner]


class Gradients(L.Callback):
    """Norms of the gradients of every step, and what was sent."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []
        self.sent = 0.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        strategy: Any = trainer.strategy
        norms = strategy.gradient_norms()
        self.found.append(torch.stack([norms[k] for k in sorted(norms)]))
        self.sent = strategy.engine.runner.gradients.sent_bytes


def train(layout: str, sync: Any = "exact", to: Any = None, **options: Any) -> dict[str, Any]:
    """A run with a way to agree on gradients; `to`: another one from the third step on."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, seen = Classifier(), Gradients()
    callbacks: list[L.Callback] = [seen, *([Switch({3: layout}, gradient_sync=to)] if to is not None else [])]
    trainer, replicas = trainer_for(
        layout, callbacks=callbacks, strategy_options={"gradient_sync": sync}, max_steps=6, **options
    )
    logger = Logged()
    trainer.loggers = [logger]
    trainer.fit(module, DataLoader(Numbers(96), batch_size=8 // replicas))
    return {
        "gradients": seen.found,
        "sent": seen.sent,
        "weights": weights(trainer, module),
        "logged": logger.found,
    }


def fifty(layout: str, sync: Any) -> list[float]:
    """The last weights' sum of 50 runs in a row."""
    return [sum(float(w.double().sum()) for w in train(layout, sync)["weights"].values()) for _ in range(50)]


class Logged(DummyLogger):
    """What was said of the bytes, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, float] = {}

    def log_metrics(self, metrics: Any, step: Any = None, **_: Any) -> None:
        if "gradient_sync/sent_mib_per_step" in metrics:
            self.found[step] = metrics["gradient_sync/sent_mib_per_step"] * 2**20


def diloco(
    layout: str,
    sync: Any,
    *,
    optimizer: str = "adamw",
    steps: int = 12,
    save: str | None = None,
    save_at: int = 0,
    ckpt_path: str | None = None,
    samples: int = 96,
) -> dict[str, Any]:
    """A run whose replicas step by themselves."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, seen = Classifier(optimizer=optimizer), Losses()
    callbacks: list[L.Callback] = [seen, *([SaveAt(save, save_at)] if save is not None else [])]
    trainer, replicas = trainer_for(
        layout, callbacks=callbacks, strategy_options={"gradient_sync": sync}, max_steps=steps, max_epochs=-1
    )
    loader = DataLoader(Numbers(samples), batch_size=8 // replicas)
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=False)
    strategy: Any = trainer.strategy
    with strategy.engine.divided():
        sent = strategy.engine.runner.gradients.sent_bytes
    return {"weights": weights(trainer, module), "losses": seen.found, "sent": sent}


class Losses(L.Callback):
    """Of every step, the mean over replicas."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(float(trainer.callback_metrics["loss_step"]))


def diloco_in_one_process(replicas: int, sync: GradientSync, *, steps: int = 12, samples: int = 96) -> dict[str, Any]:
    """Every replica by itself, one after the other, and the outer step as in the paper, written out."""
    quiet()
    L.seed_everything(7, verbose=False)
    first, data = Classifier(optimizer="adamw"), Numbers(samples)
    copies = [copy.deepcopy(first) for _ in range(replicas)]
    made: Any = [own.configure_optimizers() for own in copies]
    anchor = {n: p.detach().clone() for n, p in first.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in anchor.items()}
    losses = []
    for step in range(steps):
        found = []
        for replica, (own, (optimizers, _)) in enumerate(zip(copies, made, strict=True)):
            rows = torch.arange(step * 8 + replica, step * 8 + 8, replicas) % samples
            loss = torch.nn.functional.cross_entropy(own(data.x[rows]), data.y[rows])
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
            found.append(float(loss.detach()))
        losses.append(sum(found) / replicas)
        if (step + 1) * 8 % samples == 0:
            for _, schedulers in made:
                schedulers[0].step()
        if (step + 1) % sync.every_n_steps == 0 or step + 1 == steps:
            with torch.no_grad():
                for name in anchor:
                    delta = anchor[name] - torch.stack([dict(c.named_parameters())[name] for c in copies]).mean(0)
                    velocity[name] = sync.outer_momentum * velocity[name] + delta
                    anchor[name] -= sync.outer_learning_rate * (delta + sync.outer_momentum * velocity[name])
                    for own in copies:
                        dict(own.named_parameters())[name].copy_(anchor[name])
    return {"weights": anchor, "losses": losses}
