"""Hooks that the user has put on gradients go along when a parameter becomes another object.

`register_hook` and `register_post_accumulate_grad_hook` keep their functions in a table on the parameter. The object
that takes a parameter's place takes over the tables themselves, so that handles still remove what they added.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.parameters import Parameters

_TABLES = ("_backward_hooks", "_post_accumulate_grad_hooks")


class GradientHooks:
    """The hooks on the gradients of all parameters, held or not.

    Args:
        parameters: The parameters, before any of them is exchanged.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._tables: dict[str, dict[str, Any]] = {}
        self.collect()

    def collect(self) -> None:
        """Notes the tables that parameters have now."""
        for name in self._parameters.names:
            parameter = self._parameters[name]
            if isinstance(parameter, Ghost):
                found = {key: table for key, table in parameter.gradient_hooks.items() if table}
            else:
                found = {key: table for key in _TABLES if (table := getattr(parameter, key, None))}
            if found:
                self._tables.setdefault(name, {}).update(found)

    def attach(self) -> None:
        """Gives the tables to the objects that stand for the parameters now."""
        for name, tables in self._tables.items():
            parameter = self._parameters[name]
            if isinstance(parameter, Ghost):
                parameter.gradient_hooks.update(tables)
                continue
            for key, table in tables.items():
                if getattr(parameter, key, None) is not table:
                    setattr(parameter, key, table)

    def pass_on(self, modules: Iterable[nn.Module]) -> None:
        """Has hooks of sharded parameters run on the gradients of the gathered ones, which autograd computes.

        They see the whole gradient of this replica's samples, before it is averaged over replicas.

        Args:
            modules: Those that `fully_shard` was applied to; each is asked before it runs.
        """
        done: set[int] = set()
        for module in modules:
            if isinstance(module, FSDPModule):
                module.register_forward_pre_hook(_Gathered(module, done))


class _Gathered:
    """Before a fully sharded module runs, and after its parameters have been gathered.

    Args:
        module: The module.
        done: Ids of the gathered parameters that have got their hook, shared with the modules around and inside.
    """

    def __init__(self, module: nn.Module, done: set[int]) -> None:
        # at this time `_parameters` still holds the sharded ones
        self._places = [
            (owner, key, parameter)
            for owner in module.modules()
            for key, parameter in owner._parameters.items()
            if isinstance(parameter, DTensor)
        ]
        self._done = done

    def __call__(self, module: nn.Module, args: tuple) -> None:
        for owner, key, sharded in self._places:
            if not sharded._backward_hooks:
                continue
            gathered = owner._parameters.get(key)
            if gathered is None or gathered is sharded or id(gathered) in self._done or not gathered.requires_grad:
                continue
            self._done.add(id(gathered))  # `fully_shard` keeps this object as long as the sharded one
            gathered.register_hook(_Run(sharded))


class _Run:
    """Runs the hooks that a sharded parameter has at the time."""

    def __init__(self, sharded: torch.Tensor) -> None:
        self._sharded = sharded

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        for hook in list((self._sharded._backward_hooks or {}).values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        return gradient
