"""Private APIs of autograd and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint


def is_view(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a view in the eyes of autograd."""
    return tensor._is_view()


def after_this_backward(callback: Callable[[], None]) -> None:
    """Runs `callback` at the end of the backward pass that is running, as DistributedDataParallel does."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def in_backward() -> bool:
    """Whether autograd runs in this thread: a forward pass in it is a recomputation."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def gradients_taken_by(function: Callable[..., Any]) -> Iterator[None]:
    """Inside, `torch.autograd.grad` is `function`."""
    kept = torch.autograd.grad
    torch.autograd.grad = function
    try:
        yield
    finally:
        torch.autograd.grad = kept


class _Direct:
    """In the place of `CheckpointFunction`: no recomputation."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


class _NotReentrant:
    """In the place of `CheckpointFunction`: the other kind of recomputation."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def recomputation_off() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint.checkpoint` calls its function and keeps what it saves for the backward pass."""
    module: Any = torch.utils.checkpoint
    kept = module._checkpoint_without_reentrant_generator, module.CheckpointFunction

    def generator(*_: Any, **__: Any) -> Iterator[None]:
        yield

    module._checkpoint_without_reentrant_generator, module.CheckpointFunction = generator, _Direct
    try:
        yield
    finally:
        module._checkpoint_without_reentrant_generator, module.CheckpointFunction = kept


@contextmanager
def checkpoints_not_reentrant() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint.checkpoint(use_reentrant=True)` works as with `use_reentrant=False`.

    The results are the same. The reentrant kind keeps the arguments it is called with and finds their gradients only,
    which a pipeline stage that begins inside the function receives by another way.
    """
    module: Any = torch.utils.checkpoint
    kept = module.CheckpointFunction
    module.CheckpointFunction = _NotReentrant
    try:
        yield
    finally:
        module.CheckpointFunction = kept
