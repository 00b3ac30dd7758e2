"""Modules with one hook that changes or reads all weights; the calls run on every rank of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch

from tests.distributed.engine.state_jobs import Plain, data
from tests.distributed.jobs import quiet, trainer_for, weights


class Whole(Plain):
    """All loops, and a scheduler."""

    def validation_step(self, batch, batch_idx):
        self.log("validation", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def add_noise(module: Any) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def read(module: Any) -> None:
    module.seen.append(float(sum(p.detach().double().abs().sum() for p in module.parameters())))


def module_with(hook: str, do: Callable[[Any], None]) -> Plain:
    """A module whose `hook` does this, and then what Lightning's does."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        do(self)
        return getattr(Whole, hook)(self, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        do(self)
        optimizer.step(closure=closure)
        do(self)

    module: Any = type("Hooked", (Whole,), {hook: optimizer_step if hook == "optimizer_step" else run})()
    module.seen = []
    return module


def run(layout: str | None, hook: str, do: Callable[[Any], None], *, callback: bool = False) -> dict[str, torch.Tensor]:
    """Trains, validates, tests and predicts; the weights after training and at the end, and what was read."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = module_with(hook, do) if not callback else module_with("unused", do)
    by_callback = type("ByCallback", (L.Callback,), {hook: lambda self, trainer, pl_module, *_: do(pl_module)})
    trainer, replicas = trainer_for(layout, max_epochs=2, callbacks=[by_callback()] if callback else [])
    trainer.fit(module, data(replicas), data(replicas))
    trained = weights(trainer, module)
    trainer.test(module, data(replicas), verbose=False)
    trainer.predict(module, data(replicas))
    after = {f"after {name}": value for name, value in weights(trainer, module).items()}
    return {**trained, **after, "seen": torch.tensor(module.seen)}
