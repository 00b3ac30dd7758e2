"""Moves the user's gradient hooks to the objects that replace parameters.

`register_hook` and `register_post_accumulate_grad_hook` keep their functions in a table on the parameter. The new
object gets the same tables, so that handles of the user still remove their hooks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_hybrid._torch_private import gradient_hooks_of, own_parameters
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.parameters import Parameters

_TABLES = ("_backward_hooks", "_post_accumulate_grad_hooks")


class GradientHooks:
    """The gradient hooks of all parameters, real or ghost.

    Args:
        parameters: The parameters, before any of them is replaced.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._tables: dict[str, dict[str, Any]] = {}
        self.collect()

    def collect(self) -> None:
        """Collects the tables of the present parameters."""
        for name in self._parameters.names:
            parameter = self._parameters[name]
            if isinstance(parameter, Ghost):
                tables = {key: table for key, table in parameter.gradient_hooks.items() if table}
            else:
                tables = {key: table for key in _TABLES if (table := getattr(parameter, key, None))}
            if tables:
                self._tables.setdefault(name, {}).update(tables)

    def attach(self) -> None:
        """Sets the collected tables on the present parameters."""
        for name, tables in self._tables.items():
            parameter = self._parameters[name]
            if isinstance(parameter, Ghost):
                parameter.gradient_hooks.update(tables)
                continue
            for key, table in tables.items():
                if getattr(parameter, key, None) is not table:
                    setattr(parameter, key, table)

    def copy_to(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Registers the user's present hooks on other parameters, without those of this package in the same tables."""
        self.collect()
        for name, tables in self._tables.items():
            for key, table in tables.items():
                setattr(parameters[name], key, _of_user(table))

    def of_user(self) -> list[Callable[..., Any]]:
        """Returns the user's present hooks."""
        self.collect()
        return [
            hook for tables in self._tables.values() for table in tables.values() for hook in _of_user(table).values()
        ]

    def run_on_gathered(self, modules: Iterable[nn.Module]) -> None:
        """Runs hooks of sharded parameters on the gradients of the gathered parameters, which autograd computes.

        Hooks see the whole gradient of this replica's samples, before the average over replicas.

        Args:
            modules: The modules, of which those with `fully_shard` are used.
        """
        done: set[int] = set()
        for module in modules:
            if isinstance(module, FSDPModule):
                module.register_forward_pre_hook(_Gathered(module, done))


def _of_user(table: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """Returns a table of hooks without those of this package."""
    package = __name__.partition(".")[0]
    return OrderedDict(
        (i, hook) for i, hook in table.items() if str(getattr(hook, "__module__", "")).partition(".")[0] != package
    )


class _Gathered:
    """Registers hooks on gathered parameters before a fully sharded module runs.

    Args:
        module: The module.
        done: Ids of the gathered parameters that have their hook, shared by all modules.
    """

    def __init__(self, module: nn.Module, done: set[int]) -> None:
        # the sharded parameters, which are registered at this time
        self._places = [
            (owner, key, parameter)
            for owner in module.modules()
            for key, parameter in own_parameters(owner).items()
            if isinstance(parameter, DTensor)
        ]
        self._done = done

    def __call__(self, module: nn.Module, args: tuple) -> None:
        for owner, key, sharded in self._places:
            if not gradient_hooks_of(sharded):
                continue
            gathered = own_parameters(owner).get(key)
            if gathered is None or gathered is sharded or id(gathered) in self._done or not gathered.requires_grad:
                continue
            self._done.add(id(gathered))  # `fully_shard` keeps this object as long as the sharded one
            gathered.register_hook(_Run(sharded))


class _Run:
    """Runs the hooks that a sharded parameter has at the time of the call."""

    def __init__(self, sharded: torch.Tensor) -> None:
        self._sharded = sharded

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        for hook in gradient_hooks_of(self._sharded):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        return gradient
