"""Optimizers and schedulers that do nothing, for trials of a step with manual optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn


class IdleOptimizer:
    """Replaces one of the user's optimizers in a trial of a step.

    Args:
        optimizer: The user's optimizer, which is not changed.
        replaced: The parameters of the trial, by the id of those that the optimizer has.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, replaced: Mapping[int, torch.Tensor] = MappingProxyType({})
    ) -> None:
        self._replaced, self.optimizer = optimizer, self
        self.param_groups = [
            {**group, "params": [replaced.get(id(p), p) for p in group["params"]]} for group in optimizer.param_groups
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_replaced"], name)

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Runs `closure` only."""
        return None if closure is None else closure()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    @contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Does nothing."""
        yield


class IdleScheduler:
    """Replaces one of the user's schedulers in a trial of a step."""

    def __init__(self, scheduler: Any) -> None:
        self._replaced = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_replaced"], name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


def optimize_idly(
    root: nn.Module, optimizers: Sequence[IdleOptimizer], schedulers: Sequence[Any], backward: Callable[..., None]
) -> None:
    """Replaces, in `root.__dict__`, the methods that a step with manual optimization calls.

    Args:
        root: The LightningModule.
        optimizers: The result of `self.optimizers()`.
        schedulers: The user's schedulers.
        backward: Called in place of `manual_backward`.
    """
    idle = [IdleScheduler(scheduler) for scheduler in schedulers]
    root.__dict__.update(
        optimizers=lambda use_pl_optimizer=True: _one_or_all(optimizers),
        lr_schedulers=lambda: _one_or_all(idle) if idle else None,
        manual_backward=backward,
        clip_gradients=lambda *args, **kwargs: None,
        toggle_optimizer=lambda *args, **kwargs: None,
        untoggle_optimizer=lambda *args, **kwargs: None,
    )


def _one_or_all(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else list(values)
