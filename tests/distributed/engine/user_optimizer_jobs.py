"""Optimizers as users write them, which do more than compute each element by itself."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.contract.hook_jobs import Fused
from tests.distributed.engine.state_jobs import Plain, data
from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import Numbers, quiet, trainer_for, weights


class _PerParameter(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group["lr"])
        return loss

    def update(self, parameter: Any, lr: float) -> None:
        raise NotImplementedError


class Lamb(_PerParameter):
    """Trust ratios and moments (You et al., arXiv:1904.00962)."""

    def update(self, parameter, lr):
        state = self.state[parameter]
        moment = state.setdefault("moment", torch.zeros_like(parameter))
        moment.lerp_(parameter.grad, 0.5)
        parameter.add_(moment * (parameter.norm() / (moment.norm() + 1e-6)), alpha=-lr)


class LambOfNumbers(_PerParameter):
    """Trust ratios that are read."""

    def update(self, parameter, lr):
        ratio = float(parameter.norm()) / (float(parameter.grad.norm()) + 1e-6)
        parameter.add_(parameter.grad, alpha=-lr * ratio)


class Langevin(_PerParameter):
    """Noise on each update (Welling and Teh, ICML 2011)."""

    def update(self, parameter, lr):
        parameter.add_(parameter.grad + 0.1 * torch.randn_like(parameter), alpha=-lr)


class BySize(_PerParameter):
    """Rates by the number of elements."""

    def update(self, parameter, lr):
        parameter.add_(parameter.grad, alpha=-lr * math.log(1 + parameter.numel()))


class Centered(_PerParameter):
    """Gradients less their mean over the first dim."""

    def update(self, parameter, lr):
        parameter.add_(parameter.grad - parameter.grad.mean(dim=0, keepdim=True), alpha=-lr)


class FirstRow(_PerParameter):
    """A write into the first row."""

    def update(self, parameter, lr):
        parameter.add_(parameter.grad, alpha=-lr)
        parameter[0].mul_(0.9)


class GlobalNorm(_PerParameter):
    """The gradient of the whole model has norm 1."""

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            parameters: list[Any] = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.sqrt(torch.stack([p.grad.square().sum() for p in parameters]).sum())
            for parameter in parameters:
                parameter.add_(parameter.grad / norm, alpha=-0.05)
        return loss


class SharpnessAware(_PerParameter):
    """Two gradients a step, with norms of each parameter (Foret et al., arXiv:2010.01412)."""

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            parameters: list[Any] = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            moves = [p.grad / (p.grad.norm() + 1e-6) * 0.05 for p in parameters]
            getattr(torch, "_foreach_add_")(parameters, moves)  # noqa: B009 -- as torch's own optimizers call it
            with torch.enable_grad():
                closure()
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.sub_(move).add_(parameter.grad, alpha=-0.05)
        return loss


OPTIMIZERS = {
    kind.__name__: kind
    for kind in (Lamb, LambOfNumbers, Langevin, BySize, Centered, FirstRow, GlobalNorm, SharpnessAware)
}
MODULES: dict[str, Any] = {"Plain": Plain, "Mixture": Mixture, "Fused": Fused}


def fit(layout: str | None, module: str, optimizer: str) -> dict[str, torch.Tensor]:
    """Trains; the weights."""
    quiet()
    L.seed_everything(7, verbose=False)
    configure = {"configure_optimizers": lambda self: OPTIMIZERS[optimizer](self.parameters())}
    model = type("Optimized", (MODULES[module],), configure)()
    trainer, replicas = trainer_for(layout, max_epochs=2)
    tokens = torch.randint(16, (12, 8), generator=torch.Generator().manual_seed(1))
    samples = {"Mixture": Numbers(24), "Fused": TensorDataset(tokens)}.get(module)
    trainer.fit(model, data(replicas) if samples is None else DataLoader(samples, batch_size=8 // replicas))
    return weights(trainer, model)


def notes_by_step(layout: str) -> list[int]:
    """Trains GPT-2 with `Langevin`; how many tensors are noted as laid out like a fused weight, after each update."""
    quiet()
    model = type("Optimized", (Fused,), {"configure_optimizers": lambda self: Langevin(self.parameters())})()
    found: list[int] = []

    def note(trainer: Any, *_: Any) -> None:
        weights_shown = trainer.strategy.engine.full_tensor.__self__
        found.append(len(weights_shown._laid_out))

    trainer, replicas = trainer_for(layout, max_epochs=3, callbacks=[LambdaCallback(on_train_batch_end=note)])
    tokens = TensorDataset(torch.randint(16, (12, 8), generator=torch.Generator().manual_seed(1)))
    trainer.fit(model, DataLoader(tokens, batch_size=4 // replicas))
    return found
