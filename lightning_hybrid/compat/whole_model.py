"""Shows code of the user the parameters of the whole model: in the module, and in the groups of the optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_hybrid._lightning_private import parameters_compared_by_identity, plain_optimizer
from lightning_hybrid.compat.divided_weights import DividedWeights
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.patching import patched


@contextmanager
def whole_model(engine: Engine, weights: DividedWeights, *, stages: bool = True) -> Iterator[None]:
    """Shows parameters of all stages and all experts, and lets code change divided ones as on one process.

    Args:
        engine: The running engine.
        weights: The divided weights of this rank.
        stages: False to show those of this rank's stages only.
    """
    layout, parameters = engine.plan.layout, engine.partition.parameters
    if engine.partition.shows_whole:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(weights.shown())
        if (layout.pp > 1 and stages) or layout.ep > 1:
            stack.enter_context(optimizers_complete(engine, engine.run.trainer, weights, stages=stages))
        if layout.pp > 1:
            gradients = any(p.grad is not None for p in parameters.local().values())
            stack.enter_context(patched(parameters.observer, gradients=gradients, reworded=True))
        yield


@contextmanager
def optimizers_complete(
    engine: Engine, trainer: pl.Trainer, weights: DividedWeights | None = None, *, stages: bool = True
) -> Iterator[None]:
    """Gives the module and its optimizers all parameters in the context; freezing and additions persist."""
    engine.partition.reshard()
    parameters = engine.partition.parameters
    optimizers = [plain_optimizer(o) for o in trainer.optimizers]
    names = [engine.optimizers.names_in(o) for o in optimizers]
    with ExitStack() as stack:
        ghosts = stack.enter_context(parameters.all_visible()) if stages else set()
        stack.enter_context(parameters_compared_by_identity())
        parts = {} if weights is None else stack.enter_context(weights.experts.shown())
        for optimizer, its_names in zip(optimizers, names, strict=True):
            for group, members in zip(optimizer.param_groups, its_names, strict=True):
                shown = [parameters.visible(n) if stages else parameters[n] for n in members]
                group["params"] = [p for p in shown if stages or not isinstance(p, Ghost)]
            if weights is not None:
                _show_states(optimizer, weights, parts)
        try:
            yield
        finally:
            present = [n for n in parameters.names if parameters.is_registered(n)]  # else the hook's error follows
            named = {id(parameters.visible(n)): n for n in present} if stages else {}
            for optimizer in optimizers:
                groups = optimizer.param_groups
                if stages:
                    engine.optimizers.names[id(optimizer)] = [
                        [named.get(id(p), "") for p in group["params"]] for group in groups
                    ]
                if weights is not None:
                    _divide_states(optimizer, weights, parts, ghosts)
                for group in groups:
                    own = [p for p in group["params"] if id(p) not in ghosts]
                    group["params"] = [parts[id(p)][1] if id(p) in parts else p for p in own]
            for name in present if stages else ():
                parameters.requires_grad[name] = parameters.visible(name).requires_grad


_Parts = Mapping[int, tuple[str, nn.Parameter]]


def _show_states(optimizer: Optimizer, weights: DividedWeights, parts: _Parts) -> None:
    """Shows the state of experts under the DTensors in place of this rank's parts, as DTensors."""
    for shown in [p for group in optimizer.param_groups for p in group["params"] if id(p) in parts]:
        name, part = parts[id(shown)]
        if part in optimizer.state:
            optimizer.state[shown] = {
                key: weights.experts.spread(name, v) if isinstance(v, Tensor) and v.shape == part.shape else v
                for key, v in optimizer.state.pop(part).items()
            }


def _divide_states(optimizer: Optimizer, weights: DividedWeights, parts: _Parts, ghosts: set[int]) -> None:
    """Undoes `_show_states`; drops state of parameters of other stages."""
    for shown in [p for p in optimizer.state if id(p) in parts or id(p) in ghosts]:
        state = optimizer.state.pop(shown)
        if id(shown) in parts:
            name, part = parts[id(shown)]
            optimizer.state[part] = {
                key: weights.experts.like_part(name, v, part)
                if isinstance(v, DTensor) and v.shape == shown.shape
                else v
                for key, v in state.items()
            }
