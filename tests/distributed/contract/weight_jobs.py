"""Modules and callbacks whose hooks change weights; the calls run on every rank of a group."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn

from tests.distributed.engine.state_jobs import WIDTH, Plain, data
from tests.distributed.jobs import quiet, verified_trainer_for, weights


class Noise(Plain):
    """Noise on all weights, as in Langevin dynamics."""

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


class Reset(Plain):
    """Weights that are drawn anew, by their modules and by `nn.init`."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.blocks[1][0].reset_parameters()
            nn.init.kaiming_normal_(self.head.weight)
            nn.init.uniform_(self.blocks[2][0].weight, -0.3, 0.3)


class GradientNoise(Plain):
    """Noise on gradients."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(0.1 * torch.randn_like(parameter.grad))


class Dropped(Plain):
    """Weights of which a random part is set to zero, and later draws of other numbers."""

    def on_train_epoch_start(self) -> None:
        with torch.no_grad():
            for parameter in self.blocks.parameters():
                parameter.mul_(torch.rand_like(parameter) > 0.2)
            self.head.bias.mul_(1 + torch.rand(()))


class Assigned(Plain):
    """Values that are assigned to `.data`."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.head.weight.data = self.head.weight.data * 0.9
        self.blocks[0][0].weight.data = self.blocks[0][0].weight.data * 0.9


class Swapped(Plain):
    """A new parameter."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.head.weight = nn.Parameter(self.head.weight.detach() * 0.5)


class NewHead(Plain):
    """A new module."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.head = nn.Linear(WIDTH, 4)


class Teacher(Plain):
    """A frozen copy of the head, made when training starts."""

    def on_fit_start(self) -> None:
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[0]
        return super().training_step(batch, batch_idx) + 0.1 * (self.head(x) - self.teacher(x)).square().mean()


class Grown(Plain):
    """A head that is added and trained from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.second = nn.Linear(WIDTH, 4)
            self.trainer.optimizers[0].add_param_group({"params": list(self.second.parameters())})


class Kept(Plain):
    """A module is assigned to the place where it is."""

    def on_train_epoch_start(self) -> None:
        self.head = self.head
        self.measure = nn.MSELoss()


class NoiseByCallback(L.Callback):
    """Noise on weights, by a callback."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        Noise.on_train_batch_end(pl_module)


MODULES: dict[str, type[Plain]] = {
    kind.__name__: kind
    for kind in (Noise, Reset, GradientNoise, Dropped, Assigned, Swapped, NewHead, Plain, Teacher, Grown, Kept)
}


def fit(layout: str | None, kind: str, *, callback: bool = False) -> dict[str, torch.Tensor]:
    """Trains; the weights."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = MODULES[kind]()
    trainer, replicas = verified_trainer_for(layout, max_epochs=2, callbacks=[NoiseByCallback()] if callback else [])
    trainer.fit(module, data(replicas))
    return weights(trainer, module)
