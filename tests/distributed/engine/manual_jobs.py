"""Modules with manual optimization, and a call that trains them on every rank of a group."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.engine.state_jobs import WIDTH, Plain
from tests.distributed.jobs import quiet, verified_trainer_for, weights


class Manual(Plain):
    """Two optimizers: of the blocks and of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        blocks = torch.optim.SGD(self.blocks.parameters(), lr=0.3, momentum=0.9)
        return [blocks, torch.optim.SGD(self.head.parameters(), lr=0.3)]

    def both(self) -> tuple[Any, Any]:
        """The optimizers, without gradients."""
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        return optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        blocks, head = self.both()
        self.manual_backward(self.loss(batch))
        blocks.step()
        head.step()


class Toggled(Manual):
    """A loss for each optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


class Gan(Manual):
    """A generator, and a discriminator that is frozen by hand while the generator is trained."""

    def build(self) -> None:
        layers = (nn.Sequential(nn.Linear(4 if k == 0 else WIDTH, WIDTH), nn.Tanh()) for k in range(2))
        self.judges, self.verdict = nn.ModuleList(layers), nn.Linear(WIDTH, 1)

    def judged(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.judges:
            x = layer(x)
        return self.verdict(x)

    def judge(self, batch: Any, fake: torch.Tensor, optimizer: Any) -> None:
        loss = F.softplus(-self.judged(batch[1])).mean() + F.softplus(self.judged(fake.detach())).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def generate(self, batch: Any, optimizer: Any) -> None:
        loss = F.softplus(-self.judged(self(batch[0]))).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.1, "norm")
        optimizer.step()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        generator, judge = optimizers
        for module in (self.judges, self.verdict):
            module.requires_grad_(False)
        self.generate(batch, generator)
        for module in (self.judges, self.verdict):
            module.requires_grad_(True)
        with torch.no_grad():
            fake = self(batch[0])
        self.judge(batch, fake, judge)

    def configure_optimizers(self) -> Any:
        generator = [*self.blocks.parameters(), *self.head.parameters()]
        judge = [*self.judges.parameters(), *self.verdict.parameters()]
        return [torch.optim.Adam(generator, lr=0.01), torch.optim.Adam(judge, lr=0.01)]


class ToggledGan(Gan):
    """As in Lightning's documentation."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        generator, judge = optimizers
        with self.toggled_optimizer(judge):
            self.judge(batch, self(batch[0]), judge)
        with self.toggled_optimizer(generator):
            self.generate(batch, generator)


class LeftFrozen(Gan):
    """A network that stays frozen until the next step unfreezes it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        generator, judge = optimizers
        for networks, trained in (((self.blocks, self.head), False), ((self.judges, self.verdict), True)):
            for module in networks:
                module.requires_grad_(trained)
        self.judge(batch, self(batch[0]), judge)
        for networks, trained in (((self.blocks, self.head), True), ((self.judges, self.verdict), False)):
            for module in networks:
                module.requires_grad_(trained)
        self.generate(batch, generator)


class Alternating(Gan):
    """One of the optimizers in each step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        generator, judge = optimizers
        optimizer = (generator, judge)[batch_idx % 2]
        self.toggle_optimizer(optimizer)
        if batch_idx % 2:
            self.judge(batch, self(batch[0]), judge)
        else:
            self.generate(batch, generator)
        self.untoggle_optimizer(optimizer)


class ReadGradients(Manual):
    """Gradients of the optimizer's groups are read, logged, and scaled by their norm."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        blocks, head = self.both()
        self.manual_backward(self.loss(batch))
        norm = torch.stack([p.grad.norm() for p in blocks.param_groups[0]["params"]]).norm()
        self.log("norm", norm)
        size = sum(float(p.grad.norm()) ** 2 for p in self.parameters()) ** 0.5  # type: ignore[union-attr]
        for parameter in self.parameters():
            parameter.grad.mul_(min(1.0, 0.1 / size))  # type: ignore[union-attr]
        blocks.step()
        head.step()


class TorchClipped(Manual):
    """Gradients are clipped by torch's function."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        blocks, head = self.both()
        self.manual_backward(self.loss(batch))
        nn.utils.clip_grad_norm_(self.blocks.parameters(), 0.05)
        nn.utils.clip_grad_norm_(head.param_groups[0]["params"], 0.05)
        blocks.step()
        head.step()


class Bounded(Manual):
    """The step bounds weights after the update, as a Wasserstein GAN does."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.clamp_(-0.1, 0.1)


class Tied(Manual):
    """Two blocks share their weights."""

    def build(self) -> None:
        self.blocks[2][0].weight = self.blocks[1][0].weight


class Retained(Manual):
    """Two backward passes through the same graph."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        blocks, head = self.both()
        out = self(batch[0])
        self.manual_backward(F.mse_loss(out, batch[1]), retain_graph=True)
        self.manual_backward(0.1 * out.square().mean())
        blocks.step()
        head.step()


class Accumulated(Manual):
    """An update every two batches, and at the end of an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 2)
        if (batch_idx + 1) % 2 == 0 or self.trainer.is_last_batch:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()


class Scheduled(Manual):
    """A scheduler, and learning rates set by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        for group in self.optimizers()[1].param_groups:  # type: ignore[index] -- there are two
            group["lr"] = 0.1 * (1 + self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1, 0.5)]


class Closure(Manual):
    """A closure that the optimizer calls."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        blocks, head = self.both()

        def run() -> torch.Tensor:
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        blocks.step(closure=run)
        head.step()


class Sharpness(Manual):
    """A second backward pass at weights that the first one has moved (SAM)."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.both()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            moves = [0.05 * p.grad for p in self.parameters()]  # type: ignore[operator]
            for parameter, move in zip(self.parameters(), moves, strict=True):
                parameter.add_(move)
        blocks, head = self.both()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for parameter, move in zip(self.parameters(), moves, strict=True):
                parameter.sub_(move)
        blocks.step()
        head.step()


class FrozenInStep(Plain):
    """Automatic optimization; the step freezes weights, and unfreezes them later."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        for step, trained in ((1, False), (3, True)):
            if self.global_step == step:
                self.head.requires_grad_(trained)
                self.blocks[1].requires_grad_(trained)
        return self.loss(batch)


class ScaledByFloat(Plain):
    """Automatic optimization; a hook scales gradients by a norm that it reads as a number."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        size = sum(float(p.grad.norm()) ** 2 for p in self.parameters()) ** 0.5  # type: ignore[union-attr]
        for parameter in self.parameters():
            parameter.grad.mul_(min(1.0, 0.1 / size))  # type: ignore[union-attr]


class MeanRemoved(Plain):
    """Automatic optimization; a hook reads means of weights as numbers."""

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.sub_(0.3 * parameter.mean().item())


class RawBackward(Plain):
    """Calls `loss.backward()` instead of `manual_backward`."""

    def build(self) -> None:
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


KINDS = {kind.__name__: kind for kind in (*Manual.__subclasses__(), *Gan.__subclasses__())}
OTHERS = {kind.__name__: kind for kind in (FrozenInStep, ScaledByFloat, MeanRemoved)}
REFUSED = {"RawBackward": RawBackward}


def fit(layout: str | None, kind: str, samples: int = 21) -> dict[str, Any]:
    """Trains a module for two epochs, with an uneven last batch of 21; its weights, and what was logged."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = {**KINDS, **OTHERS, **REFUSED}[kind]()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(samples, WIDTH, generator=generator), torch.randn(samples, 4, generator=generator))
    trainer, replicas = verified_trainer_for(layout, max_epochs=2)
    trainer.fit(module, DataLoader(data, batch_size=8 // replicas))
    verified = [] if layout is None else getattr(trainer.strategy, "verification", [])
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"weights": weights(trainer, module), "logged": logged, "verified": dict(verified)}
