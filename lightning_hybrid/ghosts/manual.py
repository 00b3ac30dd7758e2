"""Optimizers that do nothing, for the dry run of a step with manual optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_hybrid._lightning_private import fresh_optimizers


class IdleOptimizer:
    """Replaces one of the user's optimizers in a dry run."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups, self.optimizer = optimizer.param_groups, self

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    @contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Does nothing."""
        yield


def idle_optimizers(root: Any) -> list[IdleOptimizer]:
    """Returns one for each optimizer that `root` configures. Call it before parameters are replaced."""
    return [IdleOptimizer(optimizer) for optimizer in fresh_optimizers(root)]


def optimize_idly(root: nn.Module, optimizers: list[IdleOptimizer], used: Callable[..., None]) -> None:
    """Replaces, in `root.__dict__`, the methods that a step with manual optimization calls.

    Args:
        root: The LightningModule.
        optimizers: The result of `self.optimizers()`.
        used: Called instead of `manual_backward`.
    """
    one = len(optimizers) == 1
    root.__dict__.update(
        optimizers=lambda use_pl_optimizer=True: optimizers[0] if one else optimizers,
        lr_schedulers=lambda: None,
        manual_backward=used,
        clip_gradients=lambda *args, **kwargs: None,
        toggle_optimizer=lambda *args, **kwargs: None,
        untoggle_optimizer=lambda *args, **kwargs: None,
    )
