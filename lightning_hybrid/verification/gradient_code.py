"""Finds code of the user that acts on gradients within a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_hybrid._torch_private import backward_hooks_of, backward_hooks_of_all, gradient_code_seen, location_of
from lightning_hybrid.engine.loss_weights import place_of
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.launch.mentions import mentions


@contextmanager
def gradient_code(runner: StepRunner) -> Iterator[list[str]]:
    """Lists the user's lines that act on gradients: those known, and those that run in the context.

    These are hooks of tensors, parameters and modules, Functions with a backward of their own, and `autograd.grad`.
    """
    lines = hook_lines(runner)
    if mentions(runner.root.modules(), "grad_fn"):  # whose hooks torch does not list
        lines.append(place_of(runner.root))
    with gradient_code_seen(lines.append):
        yield lines


def hook_lines(runner: StepRunner) -> list[str]:
    """Returns the lines that define the user's present hooks on gradients of parameters and modules."""
    hooks = runner.partition.gradient_hooks
    known = [] if hooks is None else hooks.of_user()
    known += [hook for module in runner.root.modules() for hook in backward_hooks_of(module)] + backward_hooks_of_all()
    return [location_of(hook) for hook in known]
