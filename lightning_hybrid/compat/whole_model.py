"""Shows code of the user the parameters of the whole model: in the module, and in the groups of the optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning.pytorch as pl

from lightning_hybrid._lightning_private import parameters_compared_by_identity, plain_optimizer
from lightning_hybrid.compat.divided_weights import DividedWeights
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.patching import patched


@contextmanager
def whole_model(engine: Engine, weights: DividedWeights) -> Iterator[None]:
    """Shows parameters of all stages and all experts, and lets code change divided ones as on one process."""
    layout, parameters = engine.plan.layout, engine.partition.parameters
    if engine.partition.shows_whole:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(weights.shown())
        if layout.pp > 1 or layout.ep > 1:
            stack.enter_context(optimizers_complete(engine, engine.run.trainer, weights))
        if layout.pp > 1:
            gradients = any(p.grad is not None for p in parameters.local().values())
            stack.enter_context(patched(parameters.observer, gradients=gradients, reworded=True))
        yield


@contextmanager
def optimizers_complete(engine: Engine, trainer: pl.Trainer, weights: DividedWeights | None = None) -> Iterator[None]:
    """Gives the module and its optimizers all parameters in the context; freezing and additions persist."""
    engine.partition.reshard()
    parameters = engine.partition.parameters
    optimizers = [plain_optimizer(o) for o in trainer.optimizers]
    names = [engine.optimizers.names_in(o) for o in optimizers]
    with ExitStack() as stack:
        ghosts = stack.enter_context(parameters.all_visible())
        stack.enter_context(parameters_compared_by_identity())
        parts = {} if weights is None else stack.enter_context(weights.experts.shown())
        for optimizer, its_names in zip(optimizers, names, strict=True):
            for group, members in zip(optimizer.param_groups, its_names, strict=True):
                group["params"] = [parameters.visible(n) for n in members]
        try:
            yield
        finally:
            named = {id(parameters.visible(n)): n for n in parameters.names}
            for optimizer in optimizers:
                groups = optimizer.param_groups
                engine.optimizers.names[id(optimizer)] = [
                    [named.get(id(p), "") for p in group["params"]] for group in groups
                ]
                for group in groups:
                    group["params"] = [parts.get(id(p), p) for p in group["params"] if id(p) not in ghosts]
            for name in parameters.names:
                parameters.requires_grad[name] = parameters.visible(name).requires_grad
