"""Refuses `loss.backward()` of the user where only `manual_backward` weighs the loss by the samples of the replica."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid._torch_private import user_location
from lightning_hybrid.engine.context import StepContext
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout


@contextmanager
def unweighted_backward_refused(context: StepContext, layout: Layout) -> Iterator[None]:
    """Refuses backward passes of a step that Lightning does not run, if this replica's loss needs a factor.

    Args:
        context: The context of the step.
        layout: The layout.

    Raises:
        PartitionError: If the user's code calls `loss.backward()`.
    """
    if context.loss_factor == 1.0:
        yield
        return

    before = torch.Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        if _weighted.get():
            return before(self, *args, **kwargs)
        raise PartitionError(
            f"`layout='{layout}'`: {user_location()} calls `loss.backward()` on a batch of which replicas have "
            f"different numbers of samples: the loss of this one counts {context.loss_factor:.3g} times. Call "
            "`self.manual_backward(loss)`, which weighs it, or use a loader with `drop_last=True`."
        )

    torch.Tensor.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = before  # type: ignore[method-assign]


@contextmanager
def weighted_backward() -> Iterator[None]:
    """Lets Lightning run the backward pass of a step in which `unweighted_backward_refused` is active."""
    token = _weighted.set(True)
    try:
        yield
    finally:
        _weighted.reset(token)


_weighted: ContextVar[bool] = ContextVar("weighted", default=False)
