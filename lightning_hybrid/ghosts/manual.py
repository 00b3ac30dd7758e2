"""A dry run of a step that optimizes by hand: the optimizers are there, and do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.core.optimizer import _configure_optimizers
from torch import nn


class IdleOptimizer:
    """Stands for one of the user's optimizers."""

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
    """One for each optimizer that the module configures; to be called while it still has its parameters."""
    return [IdleOptimizer(optimizer) for optimizer in _configure_optimizers(root.configure_optimizers())[0]]


def optimize_idly(root: nn.Module, optimizers: list[IdleOptimizer], used: Callable[[Any], None]) -> None:
    """Shadows, in `root.__dict__`, what a step calls to optimize by hand.

    Args:
        root: The LightningModule.
        optimizers: What `self.optimizers()` returns.
        used: Called with each loss that is handed to `manual_backward`.
    """
    one = len(optimizers) == 1
    root.__dict__.update(
        optimizers=lambda use_pl_optimizer=True: optimizers[0] if one else optimizers,
        lr_schedulers=lambda: None,
        manual_backward=lambda loss, *args, **kwargs: used(loss),
        clip_gradients=lambda *args, **kwargs: None,
        toggle_optimizer=lambda *args, **kwargs: None,
        untoggle_optimizer=lambda *args, **kwargs: None,
    )
