"""Modules whose steps and hooks go through `parameters()`."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import torch
from torch.nn import functional as F

from tests.distributed.engine.state_jobs import Plain, data
from tests.distributed.jobs import quiet, verified_trainer_for, weights


class Penalty(Plain):
    """A penalty on all weights, by the number of weights."""

    def training_step(self, batch, batch_idx):
        count = sum(p.numel() for p in self.parameters())
        return self.loss(batch) + 10 * sum(p.square().sum() for p in self.parameters() if p.requires_grad) / count


class Teacher(Plain):
    """A teacher that follows after every batch, in a hook."""

    def build(self):
        self.teacher = copy.deepcopy(self.blocks).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        teacher = batch[0]
        for block in self.teacher:
            teacher = block(teacher)
        x = batch[0]
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(self.head(x), batch[1]) + (x - teacher).square().mean()

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for p, t in zip(self.blocks.parameters(), self.teacher.parameters(), strict=True):
            t.lerp_(p, 0.5)


class Target(Teacher):
    """A target net that takes over all weights after every second batch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx % 2 == 0:
            self.teacher.load_state_dict(self.blocks.state_dict())


class Followed(Teacher):
    """A teacher that a callback moves, by a function."""

    def on_train_batch_end(self, *_):
        """Leaves it to `Follow`."""

    def configure_callbacks(self):
        return [Follow()]


class Follow(L.Callback):
    def on_train_batch_end(self, trainer, pl_module: Any, *_):
        follow(pl_module.blocks, pl_module.teacher)


@torch.no_grad()
def follow(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    for p, t in zip(student.parameters(), teacher.parameters(), strict=True):
        t.data.mul_(0.5).add_(p.data, alpha=0.5)


class InStep(Teacher):
    """A teacher that follows in the step."""

    def on_train_batch_end(self, *_):
        """Nothing is left to do."""

    def training_step(self, batch, batch_idx):
        follow(self.blocks, self.teacher)
        return super().training_step(batch, batch_idx)


class Norms(Plain):
    """A norm by hand."""

    def on_before_optimizer_step(self, optimizer):
        parameters: Any = list(self.parameters())
        total = torch.stack([p.grad.square().sum() for p in parameters]).sum()
        for p in parameters:
            p.grad /= 1 + total.sqrt()


class Values(Plain):
    """The size of all weights, read in a hook."""

    def on_train_batch_end(self, *_):
        self.size = float(sum(p.square().sum() for p in self.parameters()))


MODULES = {kind.__name__: kind for kind in (Penalty, Teacher, Target, Followed, InStep, Norms, Values)}


def fit(layout: str | None, kind: str, **options: Any) -> dict[str, Any]:
    """Trains; the weights."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = MODULES[kind]()
    trainer, replicas = verified_trainer_for(layout, strategy_options=options, max_epochs=2)
    trainer.fit(module, data(replicas))
    return {"weights": weights(trainer, module)}
