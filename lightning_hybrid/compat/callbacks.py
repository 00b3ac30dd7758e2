"""Makes all parameters of a partitioned module visible to `BaseFinetuning` and `ModelSummary` on every rank.

While hooks of these callbacks run, the module also has the parameters of other stages. Parameters that `BaseFinetuning`
freezes, or adds to an optimizer, are recorded; afterwards each optimizer has this rank's parameters only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, ModelSummary

from lightning_hybrid._lightning_private import twins
from lightning_hybrid.compat.whole_model import optimizers_complete
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.patching import patched


def patched_callbacks(engine: Engine) -> AbstractContextManager:
    """Patches the hooks of these callbacks to see all parameters; closing the returned context removes the patches."""
    stack = ExitStack()
    callbacks: list[Any] = engine.run.trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    for callback in callbacks:
        if isinstance(callback, twins(BaseFinetuning)):
            stack.enter_context(_patched_finetuning(callback, engine))
        elif isinstance(callback, twins(ModelSummary)):
            stack.enter_context(_patched_summary(callback, engine))
    return stack


def _patched_summary(callback: ModelSummary, engine: Engine) -> AbstractContextManager:
    kind = type(callback)

    @wraps(kind.on_fit_start)
    def on_fit_start(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine.partition.reshard()
        with engine.partition.parameters.all_visible():
            kind.on_fit_start(callback, trainer, pl_module)

    return patched(callback, on_fit_start=on_fit_start)


def _patched_finetuning(callback: BaseFinetuning, engine: Engine) -> AbstractContextManager:
    kind = type(callback)

    @wraps(kind.on_train_epoch_start)
    def on_train_epoch_start(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with optimizers_complete(engine, trainer):
            kind.on_train_epoch_start(callback, trainer, pl_module)

    @wraps(kind.load_state_dict)
    def load_state_dict(state_dict: dict[str, Any]) -> None:
        kind.load_state_dict(callback, state_dict)
        # a partitioned module gets its state after `on_fit_start`, where the callback would make the saved groups
        trainer = engine.run.trainer
        with optimizers_complete(engine, trainer):
            kind.on_fit_start(callback, trainer, engine.root)

    return patched(callback, on_train_epoch_start=on_train_epoch_start, load_state_dict=load_state_dict)
