"""Makes all parameters of a partitioned module visible to `BaseFinetuning` and `ModelSummary` on every rank.

While hooks of these callbacks run, the module also has the parameters of other stages. Parameters that `BaseFinetuning`
freezes, or adds to an optimizer, are recorded; afterwards each optimizer has this rank's parameters only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, ModelSummary

from lightning_hybrid._lightning_private import parameters_compared_by_identity, plain_optimizer, twins
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


@contextmanager
def optimizers_complete(engine: Engine, trainer: pl.Trainer) -> Iterator[None]:
    """Gives the module and its optimizers all parameters in the context; freezing and additions persist."""
    engine.partition.reshard()
    parameters = engine.partition.parameters
    with parameters.all_visible() as ghosts, parameters_compared_by_identity():
        optimizers = [plain_optimizer(o) for o in trainer.optimizers]
        for optimizer in optimizers:
            for group, names in zip(optimizer.param_groups, engine.optimizers.names_in(optimizer), strict=True):
                group["params"] = [parameters.visible(n) for n in names]
        try:
            yield
        finally:
            named = {id(parameters.visible(n)): n for n in parameters.names}
            for optimizer in optimizers:
                groups = optimizer.param_groups
                engine.optimizers.names[id(optimizer)] = [[named[id(p)] for p in group["params"]] for group in groups]
                for group in groups:
                    group["params"] = [p for p in group["params"] if id(p) not in ghosts]
            for name in parameters.names:
                parameters.requires_grad[name] = parameters.visible(name).requires_grad
