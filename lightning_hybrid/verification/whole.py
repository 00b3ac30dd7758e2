"""The module as the user wrote it, with whole weights, on every rank for the duration of a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_hybrid.collectives import first_problem
from lightning_hybrid.device_memory import free_bytes
from lightning_hybrid.engine.engine import Engine
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
    with partition.as_written(batch_statistics=True):
        parameters.put_all(whole)
        try:
            yield whole
        finally:
            parameters.put_all(divided)
