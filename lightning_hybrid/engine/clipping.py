"""Clips gradients by norm or by value, on whichever ranks their shards are."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from lightning_hybrid.collectives import to_local


def clip_by_norm(optimizer: Optimizer, max_norm: float, norm: Tensor) -> None:
    """Scales gradients so that their 2-norm is at most `max_norm`.

    Args:
        optimizer: The optimizer.
        max_norm: The largest norm allowed.
        norm: The 2-norm over the whole model, a scalar, equal on every rank of a replica.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    for gradient in _gradients(optimizer):
        to_local(gradient).mul_(factor.to(gradient.device))


def clip_by_value(optimizer: Optimizer, limit: int | float) -> None:
    """Clamps every element of the gradients to at most `limit` in absolute value."""
    for gradient in _gradients(optimizer):
        to_local(gradient).clamp_(-limit, limit)


def clips_untouched_gradients(trainer: pl.Trainer) -> bool:
    """Returns True if Lightning clips by norm after the backward pass without a hook of the user in between."""
    module = trainer.lightning_module
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    hooks = [module.on_before_optimizer_step, module.configure_gradient_clipping]
    hooks += [callback.on_before_optimizer_step for callback in callbacks]
    return (
        bool(trainer.gradient_clip_val)
        and trainer.gradient_clip_algorithm != GradClipAlgorithmType.VALUE
        and module.automatic_optimization
        and all(str(getattr(hook, "__module__", "")).startswith(_WITHOUT_CHANGES) for hook in hooks)
    )


_WITHOUT_CHANGES = ("lightning.pytorch.", "pytorch_lightning.", "lightning_hybrid.")
"""Packages whose hooks do not change gradients: Lightning's hooks are empty, those of this package only read them."""


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
