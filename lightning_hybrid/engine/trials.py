"""Saves and restores the state that a trial step changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_hybrid._torch_private import forget_sharded_step, unreduced_gradients_kept
from lightning_hybrid.collectives import to_local
from lightning_hybrid.engine.run import Run
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.ghosts.preserve import preserved_module_state, preserved_objects
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas.order import CollectiveOrder
from lightning_hybrid.rng.state import preserved_rng

_PACKAGE = __name__.partition(".")[0]


@contextmanager
def step_undone(runner: StepRunner) -> Iterator[None]:
    """Restores everything but weights and reduced gradients after a step, whether the step ended or failed.

    Restores modules with their buffers and metrics, the RNG state, and all objects of this package that attributes of
    `runner` refer to: reducers, pipeline stages, metrics and counters.
    """
    scaler = getattr(runner.precision, "scaler", None)
    step_module = runner.partition.step_module
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(runner.device))
        stack.enter_context(preserved_objects([*_objects_of(runner), *([] if scaler is None else [scaler])]))
        stack.enter_context(preserved_module_state(step_module))
        if isinstance(step_module, FSDPModule):
            stack.enter_context(unreduced_gradients_kept(step_module))
            stack.callback(forget_sharded_step, step_module)  # before its attributes are restored
        stack.enter_context(runner.clocks.paused())
        stack.enter_context(patched(runner, flops=None))
        yield


class KeptValues:
    """Copies of the values of tensors in the memory of the host.

    Args:
        tensors: The tensors; of DTensors this rank's shards are kept.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._kept = [(local, local.cpu().clone()) for local in (to_local(t.detach()) for t in tensors)]

    def changed(self) -> list[bool]:
        """Returns for each tensor whether it has another value now."""
        return [not torch.equal(tensor.cpu(), copy) for tensor, copy in self._kept]

    def restore(self) -> None:
        """Gives all tensors their values back."""
        with torch.no_grad():
            for tensor, copy in self._kept:
                tensor.copy_(copy)


@contextmanager
def preserved_training_state(
    parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer]
) -> Iterator[KeptValues]:
    """Restores weights, gradients and optimizers at the end, and removes the gradients at the beginning.

    Restores also which weights are trained.

    Yields:
        The kept values of the parameters.
    """
    gradients = [p.grad for p in parameters]
    weights, state = KeptValues(parameters), KeptValues(t for o in optimizers for t in tensors_in(o.state))
    with ExitStack() as stack:
        stack.enter_context(preserved_trained(parameters))
        for optimizer in optimizers:
            stack.enter_context(_preserved_optimizer(optimizer))
        drop_gradients(parameters)
        try:
            yield weights
        finally:
            weights.restore()
            state.restore()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient


@contextmanager
def preserved_trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Restores which weights are trained."""
    trained = [p.requires_grad for p in parameters]
    try:
        yield
    finally:
        for parameter, before in zip(parameters, trained, strict=True):
            parameter.requires_grad_(before)


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sets all gradients to None."""
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _preserved_optimizer(optimizer: Optimizer) -> Iterator[None]:
    """Restores options, counters and the structure of the state; the caller restores the tensors in it."""
    attributes = dict(vars(optimizer))
    groups, state = [dict(group) for group in optimizer.param_groups], _structure(dict(optimizer.state))
    try:
        yield
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        for group, options in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(options)
        optimizer.state.clear()
        optimizer.state.update(state)


def _structure(value: Any) -> Any:
    """Copies nested dicts and lists, not the tensors in them."""
    if isinstance(value, dict):
        return {k: _structure(v) for k, v in value.items()}
    return [_structure(v) for v in value] if isinstance(value, list) else value


def tensors_in(value: Any) -> list[Tensor]:
    """Returns this rank's shards of the tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return [to_local(value.detach())]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inside for tensor in tensors_in(item)]


def _objects_of(start: Any) -> list[Any]:
    """Returns `start` and all objects of this package that it refers to, but no modules, tensors, types or `Run`."""
    found: dict[int, Any] = {}
    ahead = [start]
    while ahead:
        value = ahead.pop()
        if isinstance(value, dict):
            ahead += value.values()
        elif isinstance(value, list | tuple | set | deque):
            ahead += value
        elif _is_ours(value) and id(value) not in found:
            found[id(value)] = value
            ahead += vars(value).values()
    return list(found.values())


def _is_ours(value: Any) -> bool:
    # a `Run` and a `CollectiveOrder` lead to the failure monitor, which has a thread; a `Run` also to the data, which a
    # trial does not read
    if isinstance(value, type | Tensor | nn.Module | Run | CollectiveOrder) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] == _PACKAGE
