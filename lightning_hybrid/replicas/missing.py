"""Gradients of sharded weights that some replicas do not use.

`fully_shard` reduces the weights that have a gradient on this rank; where ranks differ, their collectives would add up
gradients of different weights. Here every replica reduces all weights of a group, with zeros for those that it has not
used. Weights that no replica has used have no gradient afterwards, as in a single process: with a zero gradient an
optimizer would decay them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_hybrid._torch_private import UnreducedParameter, before_reduction


class MissingGradients:
    """Completes the gradients of fully sharded modules.

    Args:
        root: The module that runs in every step; its own weights are always reduced.
        modules: All modules, of which those with `fully_shard` are used.
        group: The ranks that shard and replicate the same weights.
    """

    def __init__(self, root: nn.Module, modules: Iterable[nn.Module], group: dist.ProcessGroup) -> None:
        self._group = group
        self._order: dict[int, int] = {}
        """Index of each sharded parameter by its `id`, equal on all ranks of the group."""
        self._parameters: list[nn.Parameter] = []
        self._used: set[int] = set()
        self._filled: dict[int, bool] = {}
        """Filled with zeros since the last update, by index; True if there was no gradient before."""
        for module in modules:
            if isinstance(module, FSDPModule):
                before_reduction(module, lambda p, reached, always=module is root: self._complete(p, reached or always))

    @property
    def count(self) -> int:
        """Number of weights that this rank has reduced without having used them, since the last `settle`."""
        return len(self._filled.keys() - self._used)

    def _complete(self, parameters: list[UnreducedParameter], wanted: bool) -> None:
        used = [p.has_gradient for p in parameters]
        if not wanted and not any(used):
            return
        for parameter, has in zip(parameters, used, strict=True):
            index = self._order.setdefault(id(parameter.sharded), len(self._order))
            if index == len(self._parameters):
                self._parameters.append(parameter.sharded)
            if has:
                self._used.add(index)
            else:
                self._filled.setdefault(index, parameter.sharded.grad is None)
                parameter.set_zero()

    def settle(self) -> None:
        """Removes the gradients of weights that no replica has used. Collective over the group."""
        flags = torch.zeros(len(self._parameters), device=self._parameters[0].device if self._parameters else None)
        for index in self._used:
            flags[index] = 1.0
        dist.all_reduce(flags, group=self._group)
        for index, was_none in self._filled.items():
            if was_none and not flags[index]:
                self._parameters[index].grad = None
        self.forget()

    def forget(self) -> None:
        """Forgets the gradients since the last update."""
        self._used, self._filled = set(), {}
