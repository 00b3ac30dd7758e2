"""The module as the user wrote it, with whole weights, on every rank for the duration of a context."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_hybrid._torch_private import own_parameters
from lightning_hybrid.parallelize.apply import Partition


def gathered_weights(partition: Partition) -> dict[str, Tensor]:
    """Returns copies of all whole weights by name, on every rank. Collective."""
    partition.reshard()
    return {name: partition.whole_parameter(name) for name in partition.parameters.names}


@contextmanager
def whole_module(partition: Partition, weights: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Gives the module whole weights, and disables everything that the partition has installed.

    The calls of units stay intercepted, so that units draw the same random numbers.

    Args:
        partition: The applied partition.
        weights: The whole weights, by name.

    Yields:
        The whole parameters by name, with the user's gradient hooks.
    """
    parameters, whole = partition.parameters, dict[str, nn.Parameter]()
    registered: dict[nn.Module, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, places in parameters.slots.items():
        present: Any = parameters[name]
        trained = getattr(present, "wants_grad", present.requires_grad)  # of a ghost: what its holder does
        whole[name] = nn.Parameter(weights[name], requires_grad=trained)
        for place in places:
            registered[place.module][place.key] = whole[name]
    if partition.gradient_hooks is not None:
        partition.gradient_hooks.copy_to(whole)
    with ExitStack() as stack:
        stack.enter_context(partition.bare())
        if partition.experts is not None:
            stack.enter_context(partition.experts.undivided())
        for module, present in registered.items():
            own = own_parameters(module)
            stack.callback(_replace, own, dict(own))
            for key in [key for key in present if key in module.__dict__]:  # ghosts
                stack.callback(module.__dict__.__setitem__, key, module.__dict__.pop(key))
            _replace(own, {**present, **{key: value for key, value in own.items() if key not in present}})
        yield whole


def _replace(table: dict, content: Mapping) -> None:
    content = dict(content)
    table.clear()
    table.update(content)
