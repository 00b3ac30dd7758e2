"""Weights that follow others in hooks of the module and of callbacks, which a pipeline keeps on the same stages."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn

from lightning_hybrid.ghosts.dry_run import trace_step
from lightning_hybrid.ghosts.units import CallInterceptor, find_units


class Module(L.LightningModule):
    """A net and its teacher, neither of which follows the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - self.teacher(batch)).square().mean()


class Averaged(Module):
    def on_train_batch_end(self, *_):
        follow(self.net, self.teacher)


class Copied(Module):
    def on_before_zero_grad(self, optimizer):
        self.teacher.load_state_dict(self.net.state_dict())


class Follow(L.Callback):
    logged = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.logged += len(list(pl_module.parameters()))  # only looks, and is not run

    def on_train_batch_end(self, trainer, pl_module: Any, *_):
        follow(pl_module.net, pl_module.teacher)


@torch.no_grad()
def follow(student: nn.Module, teacher: nn.Module) -> None:
    for p, t in zip(student.parameters(), teacher.parameters(), strict=True):
        t.mul_(0.5).add_(p, alpha=0.5)


def followers(module: Module, *callbacks: L.Callback) -> dict[str, set[str]]:
    if callbacks:
        module.trainer = SimpleNamespace(callbacks=list(callbacks))  # type: ignore[assignment]
    interceptor = CallInterceptor(module, find_units(module))
    interceptor.install()
    try:
        trace = trace_step(module, interceptor, module.training_step, (torch.ones(2, 4), 0), device=torch.device("cpu"))
        return trace.followers
    finally:
        interceptor.remove()


EXPECTED = {f"teacher.{i}.{n}": {f"net.{i}.{n}"} for i in range(2) for n in ("weight", "bias")}


def test_a_teacher_follows_in_a_hook_of_the_module() -> None:
    assert followers(Averaged()) == EXPECTED
    assert followers(Copied()) == EXPECTED


def test_a_teacher_follows_in_a_callback_and_callbacks_that_only_look_are_not_run() -> None:
    callback = Follow()
    assert followers(Module(), callback) == EXPECTED
    assert callback.logged == 0
    assert followers(Module()) == {}
