"""Private APIs of autograd and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from lightning_hybrid._torch_private.frames import user_location

_OTHERS = ("torch.", "lightning.", "pytorch_lightning.", "lightning_hybrid.")
_OPERATORS = "torch._library.autograd"
"""Module of the Functions that torch makes of operators of `torch.library`."""


def is_view(tensor: torch.Tensor) -> bool:
    """Returns True if autograd counts `tensor` as a view."""
    return tensor._is_view()


def version_of(tensor: torch.Tensor) -> int:
    """Returns how often `tensor` was written in place; 0 for tensors of inference mode, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def after_this_backward(callback: Callable[[], None]) -> None:
    """Runs `callback` at the end of the running backward pass, as DistributedDataParallel does."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def in_backward() -> bool:
    """Returns True while autograd runs in this thread; a forward pass is then a recomputation."""
    return torch._C._current_graph_task_id() != -1


def in_transform() -> bool:
    """Returns True inside a function that a transform of `torch.func` (`vmap`, `grad`) runs."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


@contextmanager
def gradients_taken_by(function: Callable[..., Any]) -> Iterator[None]:
    """Replaces `torch.autograd.grad` by `function` for the duration of the context."""
    kept = torch.autograd.grad
    torch.autograd.grad = function
    try:
        yield
    finally:
        torch.autograd.grad = kept


@contextmanager
def gradient_code_seen(seen: Callable[[str], None]) -> Iterator[None]:
    """Calls `seen` with the user's line where code registers a hook on a tensor, or takes gradients by autograd.grad.

    Also where it applies an `autograd.Function`, or an operator, whose backward is not torch's.
    """
    register, take, apply = torch.Tensor.register_hook, torch.autograd.grad, torch.autograd.Function.__dict__["apply"]

    def registering(tensor: torch.Tensor, hook: Callable[..., Any]) -> Any:
        seen(user_location())
        return register(tensor, hook)

    def taking(*args: Any, **kwargs: Any) -> Any:
        seen(user_location())
        return take(*args, **kwargs)

    def applying(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not function.__module__.startswith(_OTHERS) or function.__module__ == _OPERATORS:
            seen(user_location())
        return apply.__func__(function, *args, **kwargs)

    torch.Tensor.register_hook, torch.autograd.grad = registering, taking  # type: ignore[assignment]
    torch.autograd.Function.apply = classmethod(applying)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.Tensor.register_hook, torch.autograd.grad = register, take
        torch.autograd.Function.apply = apply


class _Direct:
    """Replaces `CheckpointFunction` without recomputation."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


class _NotReentrant:
    """Replaces `CheckpointFunction` by non-reentrant recomputation."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def recomputation_off() -> Iterator[None]:
    """Makes `torch.utils.checkpoint.checkpoint` call its function without recomputation, saving all activations."""
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
    """Makes `torch.utils.checkpoint.checkpoint(use_reentrant=True)` work as with `use_reentrant=False`.

    The results are the same. Reentrant recomputation computes gradients of the arguments of the call only; a pipeline
    stage that begins inside the function receives its inputs in another way.
    """
    module: Any = torch.utils.checkpoint
    kept = module.CheckpointFunction
    module.CheckpointFunction = _NotReentrant
    try:
        yield
    finally:
        module.CheckpointFunction = kept
