"""Runs what Lightning runs before the first batch, for the dry run of a step that needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import lightning.pytorch as pl

from lightning_hybrid._lightning_private import (
    fresh_optimizers_set,
    is_overridden,
    training_loaders_set,
    users_callbacks,
)
from lightning_hybrid.ghosts.preserve import preserved_objects

_HOOKS = {"training_step": ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")}
_HOOKS |= {
    f"{kind}_step": (f"on_{kind}_start", f"on_{kind}_epoch_start", f"on_{kind}_batch_start")
    for kind in ("validation", "test", "predict")
}


@contextmanager
def as_at_first_batch(root: pl.LightningModule, step: str, batch: Any) -> Iterator[None]:
    """Enters a state as at the first batch: loaders, optimizers, and the hooks of the module and of user callbacks.

    A hook that fails is left out: the step may not need it. The caller restores the state of the module.

    Args:
        root: The LightningModule, attached to a trainer.
        step: Name of the step function.
        batch: The first batch.
    """
    trainer = root.trainer
    callbacks = users_callbacks(trainer)
    with ExitStack() as stack:
        stack.enter_context(preserved_objects(callbacks))
        if step == "training_step":
            _enter_if_possible(stack, lambda: training_loaders_set(trainer))
            _enter_if_possible(stack, lambda: fresh_optimizers_set(trainer))
        root.__dict__["log"] = lambda *args, **kwargs: None
        for hook in _HOOKS[step]:
            args = (batch, 0) if hook.endswith("batch_start") else ()
            for callback in callbacks:
                if is_overridden(hook, callback):
                    _run_if_possible(getattr(callback, hook), trainer, root, *args)
            if is_overridden(hook, root):
                _run_if_possible(getattr(root, hook), *args)
        yield


def _run_if_possible(hook: Callable[..., Any], *args: Any) -> None:
    with suppress(Exception):  # of any class: user code runs before all that it may need exists
        hook(*args)


def _enter_if_possible(stack: ExitStack, context: Callable[[], AbstractContextManager]) -> None:
    with suppress(Exception):  # of any class: from `configure_optimizers` or a loader of the user
        stack.enter_context(context())
