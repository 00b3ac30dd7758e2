"""Shows hooks of the user all parameters of a pipeline; values of other stages are refused with the line.

Without this, `parameters()` in a hook would show one stage as if it were the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging

from lightning_hybrid._lightning_private import is_overridden, twins, users_callbacks
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.ghosts.ghost import GhostReadError, GhostWriteError
from lightning_hybrid.patching import patched
from lightning_hybrid.spec.errors import PartitionError

_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "on_train_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_batch_end",
)
_ADAPTED = twins(WeightAveraging)
"""Callbacks that are adapted elsewhere (`compat.averaging`), with classes derived from them."""


def patched_hooks(engine: Engine) -> AbstractContextManager:
    """Patches the user's hooks to see all parameters; closing the returned context removes the patches."""
    stack = ExitStack()
    if engine.plan.layout.pp == 1:
        return stack
    users = [c for c in users_callbacks(engine.run.trainer) if not isinstance(c, _ADAPTED)]
    for owner in [engine.root, *users]:
        parent: Any = pl.LightningModule if owner is engine.root else pl.Callback
        for name in _HOOKS:
            if hasattr(parent, name) and name not in owner.__dict__ and is_overridden(name, owner):
                stack.enter_context(patched(owner, **{name: _seeing_all(getattr(owner, name), engine)}))
    return stack


def _seeing_all(hook: Callable[..., Any], engine: Engine) -> Callable[..., Any]:
    parameters = engine.partition.parameters

    @wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        gradients = any(p.grad is not None for p in parameters.local().values())
        with parameters.all_visible(), patched(parameters.observer, gradients=gradients):
            try:
                return hook(*args, **kwargs)
            except RuntimeError as error:
                if not isinstance(error, GhostReadError | GhostWriteError) and "pipeline stage" not in str(error):
                    raise  # `load_state_dict` puts errors into another one
                layout, text = engine.plan.layout, " ".join(str(error).splitlines()[:2])
                raise PartitionError(
                    f"`layout='{layout}'` divides the weights into pipeline stages, and a hook needs one of another "
                    f"stage: {text} Use `torch.nn.utils.clip_grad_norm_` or `gradient_clip_val` to clip, "
                    "`strategy.gradient_norms()` and `strategy.full_state_dict()` for norms and weights, or a layout "
                    f"without `pp`, such as '{layout.moved('pp', 'dp')}'."
                ) from error

    return run
