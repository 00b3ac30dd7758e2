"""Modules and calls for the tests of what users do with gradients and parameter groups; they run on every rank."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import grad_norm
from torch.utils.data import DataLoader

from lightning_hybrid import HybridStrategy
from lightning_hybrid.engine import norms
from lightning_hybrid.ghosts.ghost import Ghost
from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights


class Gradients(L.Callback):
    """Reads gradients where users do, and changes them in place.

    Args:
        factor: By what gradients are multiplied, in the hook `where`.
        where: The hook.
    """

    def __init__(self, factor: float = 1.0, where: str = "") -> None:
        self.factor, self.where = factor, where
        self.found: list[tuple[str, dict[str, torch.Tensor]]] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._use("on_after_backward", trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self._use("on_before_optimizer_step", trainer, pl_module)

    def _use(self, hook: str, trainer: L.Trainer, root: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        present = {n: p.grad for n, p in root.named_parameters() if p.grad is not None}
        if isinstance(strategy, HybridStrategy):
            own = {n: g for n, g in present.items() if not isinstance(g, Ghost)}  # ghosts are on other stages
            present = {n: strategy.engine.partition.gathered(n, g) for n, g in own.items()}
        self.found.append((hook, {n: g.detach().clone() for n, g in present.items()}))
        if hook == self.where:
            for parameter in root.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.factor)


def with_gradients(
    layout: str | None, callback_options: dict[str, Any], *, tied: str = "", alone: bool = False, **options: Any
) -> dict[str, Any]:
    """Trains with a callback that uses gradients.

    Args:
        layout: The layout; None: one process.
        callback_options: Arguments of `Gradients`.
        tied: Whether the first and the last block share a weight: `trained` or `frozen`.
        alone: Whether rank 0 alone has the callback.
        **options: Arguments of the Trainer.
    """
    quiet()
    L.seed_everything(7, verbose=False)
    module, callback = Classifier(optimizer="adamw"), Gradients(**callback_options)
    if tied:
        module.blocks[3].up.weight = module.blocks[0].up.weight.requires_grad_(tied == "trained")
    here = not alone or os.environ.get("RANK", "0") == "0"
    trainer, replicas = trainer_for(layout, callbacks=[callback] if here else [], **options)
    trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    return {"weights": weights(trainer, module), "found": callback.found}


class _Norms(L.Callback):
    """Logs norms of gradients; those of Lightning in one process."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        strategy: Any = trainer.strategy
        given = hasattr(strategy, "gradient_norms")
        norms: Any = strategy.gradient_norms() if given else grad_norm(pl_module, 2)
        self.found.append({name: float(norm) for name, norm in norms.items()})
        pl_module.log_dict(norms)


def norms_of_gradients(
    layout: str | None, module_options: dict[str, Any], *, tied: bool = False, **options: Any
) -> dict[str, Any]:
    """Trains; the norms of every step, those that were logged last, and the weights.

    Args:
        layout: The layout; None: one process.
        module_options: Arguments of `Classifier`.
        tied: Whether the first and the last block share a weight.
        **options: Arguments of the Trainer.
    """
    quiet()
    L.seed_everything(7, verbose=False)
    module, callback = Classifier(**module_options), _Norms()
    if tied:
        module.blocks[3].up.weight = module.blocks[0].up.weight
    trainer, replicas = trainer_for(layout, callbacks=[callback], **options)
    trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    logged = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("grad_")}
    return {"found": callback.found, "logged": logged, "weights": weights(trainer, module)}


class _Halves(L.Callback):
    """Halves the gradients before they are clipped."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class _Looks(L.Callback):
    """A hook at this place that changes nothing."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        pass


class _ClipsTwice(Classifier):
    """Clips by itself, the second time more than the first."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        for _ in range(2):
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(3.0)


def clipped(layout: str | None, hook: str = "") -> dict[str, Any]:
    """Trains with clipping, and counts how often this rank's gradients were measured.

    Args:
        layout: The layout; None: one process.
        hook: Between backward pass and clipping: none, `"halves"`, `"looks on rank 0"` or `"clips twice"`.
    """
    quiet()
    L.seed_everything(7, verbose=False)
    module = _ClipsTwice() if hook == "clips twice" else Classifier()
    callbacks: list[L.Callback] = [_Halves()] if hook == "halves" else []
    if hook == "looks on rank 0" and os.environ.get("RANK", "0") == "0":
        callbacks.append(_Looks())
    trainer, replicas = trainer_for(layout, callbacks=callbacks, max_steps=3, gradient_clip_val=0.05)
    measured = []

    def counting(tensors: Any) -> list[torch.Tensor]:
        measured.append(len(tensors))
        return norms_of(tensors)

    norms_of, norms.norms_of = norms.norms_of, counting
    try:
        trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    finally:
        norms.norms_of = norms_of
    return {"weights": weights(trainer, module), "measured": measured}


class _Unfreezes(L.Callback):
    """Gives the optimizer a group of what was frozen, when the second epoch starts."""

    def __init__(self, everything: bool) -> None:
        self.everything = everything

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        root: Any = pl_module
        if trainer.current_epoch == 1:
            module = root if self.everything else root.blocks
            known = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            added = [p for p in module.parameters() if id(p) not in known]
            for parameter in added:
                parameter.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": added, "lr": 0.05})


def with_an_added_group(layout: str | None, *, everything: bool = True, save: str | None = None, **options: Any) -> Any:
    """Trains the head, then more, in a parameter group that a callback adds."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Classifier(optimizer="head")
    trainer, replicas = trainer_for(layout, callbacks=[_Unfreezes(everything)], max_epochs=2, **options)
    trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    if save is not None:
        trainer.save_checkpoint(save)
    saved: Any = trainer.strategy.optimizer_state(trainer.optimizers[0])
    return {"weights": weights(trainer, module), "groups": [g["params"] for g in saved["param_groups"]]}
