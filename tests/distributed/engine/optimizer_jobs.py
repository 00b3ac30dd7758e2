"""Modules and calls for the tests of gradient hooks and optimizers; they run on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.distributed.engine.numbers_jobs import Plain
from tests.distributed.jobs import Numbers, quiet, trainer_for, weights


class Hooked(Plain):
    """Hooks of the user on gradients, and gradients taken inside of the step.

    Args:
        when: When the hooks are put on: in `__init__`, `configure_model` or `on_train_start`.
        penalty: Whether the loss has a penalty on gradients, which `torch.autograd.grad` gives.
    """

    def __init__(self, when: str = "", penalty: bool = False) -> None:
        super().__init__()
        self.when, self.penalty = when, penalty
        self.fired: list[str] = []
        self.norms: list[float] = []
        if when == "configure_model":
            del self.stem
            self.blocks = self.head = None
        if when == "__init__":
            self._hook()

    def _hook(self) -> None:
        first, second = self.blocks[1].up.weight, self.blocks[2].down.weight
        first.register_hook(self._halved)
        second.register_post_accumulate_grad_hook(lambda p: self.fired.append("accumulated"))

    def _halved(self, gradient):
        self.fired.append("computed")
        return gradient * 0.5

    def configure_model(self):
        padding = self.blocks is None
        super().configure_model()
        if padding:
            self._hook()

    def on_train_start(self):
        if self.when == "on_train_start":
            self._hook()

    def training_step(self, batch, batch_idx):
        if not self.penalty:
            return super().training_step(batch, batch_idx)
        x = batch["x"].requires_grad_()
        logits = self(x)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        loss = nn.functional.cross_entropy(logits, batch["y"])
        return loss + 0.1 * gradient.square().sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def hooked(layout: str | None, module_options: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Trains with hooks on gradients."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Hooked(**module_options)
    trainer, replicas = trainer_for(layout, **options)
    trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    return {"weights": weights(trainer, module), "fired": Counter(module.fired)}


def _groups(module: L.LightningModule) -> Any:
    """A rate for every weight, and a schedule that changes rate and momentum every step."""
    parameters = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(module.parameters())]
    optimizer = torch.optim.SGD(parameters, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=6)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


OPTIMIZERS: dict[str, Callable[[L.LightningModule], Any]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-4),
    "AdamW, foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-4, foreach=True),
    "AdamW, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-4, fused=True),
    "SGD, foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "SGD, fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
    "groups and a schedule": _groups,
}


class Optimized(Plain):
    """Any optimizer, a warm-up by hand, clipping of the user's own.

    Args:
        optimizer: A key of `OPTIMIZERS`.
        warm_up: Whether `optimizer_step` sets the rate.
        clip: `""`, `"configured"` (`configure_gradient_clipping`) or `"by hand"` (two optimizers, stepped by hand).
    """

    def __init__(self, optimizer: str = "AdamW", warm_up: bool = False, clip: str = "") -> None:
        super().__init__(manual=clip == "by hand")
        self.optimizer, self.warm_up, self.clip = optimizer, warm_up, clip

    def training_step(self, batch, batch_idx):
        if self.clip != "by hand":
            return super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        for optimizer, kind, value in zip(optimizers, ("norm", "value"), (0.05, 0.01), strict=True):
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=kind)
            optimizer.step()
        return None

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        value: Any = 0.03 if self.clip == "configured" else gradient_clip_val
        self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=gradient_clip_algorithm)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.warm_up:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (batch_idx + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_optimizers(self):
        return super().configure_optimizers() if self.clip == "by hand" else OPTIMIZERS[self.optimizer](self)


def optimized(layout: str | None, module_options: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    """The weights after training with an optimizer."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Optimized(**module_options)
    trainer, replicas = trainer_for(layout, **options)
    trainer.fit(module, DataLoader(Numbers(96), batch_size=16 // replicas))
    return weights(trainer, module)


def whole_model_compiled(layout: str) -> None:
    """A LightningModule that the user has compiled."""
    quiet()
    trainer, _ = trainer_for(layout)
    compiled: Any = torch.compile(Plain())
    trainer.fit(compiled, DataLoader(Numbers(), batch_size=8))
