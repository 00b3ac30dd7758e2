"""The module as the user wrote it, with whole weights, on every rank for the duration of a context."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hybrid._torch_private import own_parameters
from lightning_hybrid.parallelize.apply import Partition


class Weights(NamedTuple):
    """The whole weights of a module on one rank."""

    values: dict[str, Tensor]
    trained: dict[str, bool]
    """`requires_grad` of each parameter on the ranks that hold it."""

    @classmethod
    def gather(cls, partition: Partition) -> Weights:
        """Gathers copies of all weights on every rank. Collective."""
        partition.reshard()
        parameters, local = partition.parameters, partition.parameters.local()
        flags = torch.tensor([float(n in local and local[n].requires_grad) for n in parameters.names])
        flags = flags.to(next(iter(local.values())).device if local else None)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        trained = dict(zip(parameters.names, map(bool, flags.tolist()), strict=True))
        return cls({name: partition.whole_parameter(name) for name in parameters.names}, trained)


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
    parameters, whole = partition.parameters, dict[str, nn.Parameter]()
    registered: dict[nn.Module, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, places in parameters.slots.items():
        whole[name] = nn.Parameter(weights.values[name], requires_grad=weights.trained[name])
        for place in places:
            registered[place.module][place.key] = whole[name]
    if partition.gradient_hooks is not None:
        partition.gradient_hooks.copy_to(whole)
    with ExitStack() as stack:
        stack.enter_context(partition.bare(batch_statistics=True))
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
