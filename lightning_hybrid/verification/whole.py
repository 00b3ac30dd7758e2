"""The module as the user wrote it, with whole weights, on every rank for the duration of a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_hybrid.collectives import first_problem, gather_objects, to_full
from lightning_hybrid.device_memory import free_bytes
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.ghosts.contract import StatePlace
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.objects import map_leaves
from lightning_hybrid.ghosts.state import ModuleState
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.whole import Weights

_COPIES = 3
"""Memory that a step of one process needs, in sizes of the model: weights, gradients, and activations; empirical."""


def memory_problem(engine: Engine) -> str | None:
    """Returns why the whole model does not fit on a rank, the same on all ranks; None if it fits. Collective."""
    needed = _COPIES * sum(p.elements for p in engine.plan.model.parameters.values()) * 4
    available = free_bytes(engine.device, engine.runner.root.trainer.num_devices)
    if available is None or needed <= available:
        return first_problem(None)
    return first_problem(f"the whole model needs {needed / 2**30:.1f} GiB, a rank has {available / 2**30:.1f} GiB")


def gather_weights(partition: Partition) -> Weights:
    """Gathers all weights, and copies of weights that hooks keep in the module. Collective over all ranks."""
    weights = Weights.gather(partition)
    if partition.plan.layout.pp == 1:
        return weights
    state, group = ModuleState(partition.root), partition.mesh.group("pp")
    with_ghosts = {place for place, value in state.places() if any(map(_is_elsewhere, _tensors_in(value)))}
    places = sorted(set().union(*gather_objects(with_ghosts, group)))
    own = [[None if _is_elsewhere(t) else to_full(t.detach()).cpu() for t in _tensors_in(state.get(p))] for p in places]
    whole: dict[StatePlace, Any] = {}
    for place, *of_stages in zip(places, *gather_objects(own, group), strict=True):
        values = iter([next((t for t in same if t is not None), None) for same in zip(*of_stages, strict=False)])

        def filled(tensor: Tensor, values: Iterator[Tensor | None] = values) -> Tensor:
            value = next(values, None)
            return tensor if value is None or not _is_elsewhere(tensor) else value.to(tensor.device)

        whole[place] = map_leaves(filled, state.get(place))
    return weights._replace(state=whole)


def _is_elsewhere(tensor: Tensor) -> bool:
    return isinstance(tensor, Ghost) and tensor.received is None


def _tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_leaves(lambda t: found.append(t) or t, value)
    return found


@contextmanager
def whole_module(partition: Partition, weights: Weights) -> Iterator[dict[str, nn.Parameter]]:
    """Gives the module whole weights, and disables everything that the partition has installed.

    Calls of units stay intercepted, so that units draw the same random numbers, and BatchNorm has the statistics of all
    replicas.

    Args:
        partition: The applied partition.
        weights: The whole weights.

    Yields:
        The whole parameters by name, with the user's gradient hooks.
    """
    parameters = partition.parameters
    whole = {n: nn.Parameter(weights.values[n], requires_grad=weights.trained[n]) for n in parameters.names}
    if partition.gradient_hooks is not None:
        partition.gradient_hooks.copy_to(whole)
    divided = {name: parameters[name] for name in parameters.names}
    with partition.as_written(batch_statistics=True), ModuleState(partition.root).holding(weights.state):
        parameters.put_all(whole)
        try:
            yield whole
        finally:
            parameters.put_all(divided)
