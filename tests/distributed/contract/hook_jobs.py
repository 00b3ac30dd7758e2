"""Modules with one hook that changes or reads all weights; the calls run on every rank of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from tests.distributed.engine.state_jobs import WIDTH, Plain, data
from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import Numbers, quiet, trainer_for, weights


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


class WholeMixture(Mixture):
    """Blocks of experts."""


class Fused(L.LightningModule):
    """GPT-2: queries, keys and values in one weight, whose parts ranks of `tp` have in another order."""

    def __init__(self) -> None:
        super().__init__()
        sizes: Any = {"n_layer": 2, "n_head": 4, "n_embd": WIDTH, "vocab_size": 16, "n_positions": 8}
        rates: Any = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0))

    @property
    def fused(self) -> Any:
        model: Any = self.model
        return model.transformer.h[0].attn.c_attn.weight

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def add_noise_by_groups(module: Any) -> None:
    with torch.no_grad():
        for parameter in (p for group in module.trainer.optimizers[0].param_groups for p in group["params"]):
            parameter.add_(0.1 * torch.randn_like(parameter))


def read_by_groups(module: Any) -> None:
    groups = module.trainer.optimizers[0].param_groups
    module.seen.append(float(sum(p.detach().abs().sum() for group in groups for p in group["params"])))


def read_fused(module: Any) -> None:
    weight = module.fused
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    module.seen += [
        float(weight.detach().norm()),
        float(weight.detach().abs().mean()),
        float(whole.detach()[3, WIDTH + 1]),
        whole.numel(),
    ]
    with torch.no_grad():
        weight.mul_(0.9).div_(weight.norm())


def halve_queries(module: Any) -> None:
    with torch.no_grad():
        module.fused[:, :WIDTH].mul_(0.5)


KINDS: dict[str, type] = {"Whole": Whole, "Mixture": WholeMixture, "Fused": Fused}


def module_with(hook: str, do: Callable[[Any], None], kind: str = "Whole") -> Any:
    """A module whose `hook` does this, and then what Lightning's does."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        do(self)
        return getattr(KINDS[kind], hook)(self, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        do(self)
        optimizer.step(closure=closure)
        do(self)

    module: Any = type("Hooked", (KINDS[kind],), {hook: optimizer_step if hook == "optimizer_step" else run})()
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


def train(layout: str | None, hook: str, do: Callable[[Any], None], kind: str) -> dict[str, torch.Tensor]:
    """Trains; the weights, and what was read."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = module_with(hook, do, kind)
    trainer, replicas = trainer_for(layout, max_epochs=2)
    tokens = torch.randint(16, (12, 8), generator=torch.Generator().manual_seed(1))
    samples = {"Mixture": Numbers(24), "Fused": TensorDataset(tokens)}.get(kind)
    trainer.fit(module, data(replicas) if samples is None else DataLoader(samples, batch_size=8 // replicas))
    return {**weights(trainer, module), "seen": torch.tensor(module.seen)}
