"""A key by which blocks that compute alike share one inference of their division."""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Mapping
from enum import Enum
from typing import Any, Protocol

import torch
from torch import nn

from lightning_hybrid._torch_private import forward_hooks_of, is_plain
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.trees import map_tensors, sorted_slots
from lightning_hybrid.tensor.attributes import is_position
from lightning_hybrid.tensor.numbers import buffer_slots

_DEPTH = 3
"""Objects in objects that are compared by their attributes; deeper ones by their class."""
_ITEMS = 256
"""Longest list that is compared by its elements."""
_OF_TORCH = {*vars(nn.Module()), "_flat_weights", "_all_weights", "_flat_weight_refs"}
_SCALARS = (int, bool, str, bytes, type(None), Enum, torch.dtype, torch.device, slice, range)
"""Floats are not compared: layers differ in them (drop rates), and they do not change which values depend on which."""


class UnitArguments(Protocol):
    """The arguments of a call of a unit."""

    @property
    def args(self) -> tuple:
        """Positional arguments."""
        ...

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments."""
        ...


def signature_of(module: nn.Module, call: UnitArguments) -> Hashable:
    """Returns a key that is equal for units that can share one inference.

    Args:
        module: The unit.
        call: Its recorded call.
    """
    modules: list[Hashable] = [type(module)]
    for name, child in module.named_modules():
        values = [
            (k, id(v) if k == "config" else _key(v))
            for k, v in sorted(vars(child).items())
            if k not in _OF_TORCH and not is_position(k) and not isinstance(v, Ghost | nn.Module | float)
        ]
        modules.append((name, type(child), bool(forward_hooks_of(child)), tuple(values)))
    modules += [(s.name, tuple(s.tensor.shape), s.tensor.dtype) for s in sorted_slots(module)]
    modules += [(s.name, _tensor_key(s.tensor)) for s in buffer_slots(module)]
    described: list[Hashable] = []

    def describe(path: Any, tensor: torch.Tensor) -> None:
        derived = isinstance(tensor, Ghost) or tensor.requires_grad
        described.append((path, tuple(tensor.shape), tensor.dtype, derived))

    plain = map_tensors(describe, (call.args, call.kwargs))
    return tuple(modules), tuple(described), _plain_repr(plain)


def _key(value: Any, depth: int = _DEPTH) -> Hashable:
    """Returns a key that is equal for values with which a module computes alike."""
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return _tensor_key(value)
    if not depth:
        return type(value).__name__
    if isinstance(value, Mapping):
        return tuple((repr(k), _key(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)) and len(value) <= _ITEMS:
        return tuple(_key(v, depth - 1) for v in value)
    if callable(value) or isinstance(value, types.CellType):
        return _function_key(value, depth - 1)
    if isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return type(value).__name__
    return type(value).__name__, _key({k: v for k, v in vars(value).items() if not isinstance(v, float)}, depth - 1)


def _function_key(value: Any, depth: int) -> Hashable:
    if isinstance(value, functools.partial):
        return _function_key(value.func, depth), _key(value.args, depth), _key(value.keywords, depth)
    if isinstance(value, types.MethodType):
        return _function_key(value.__func__, depth), type(value.__self__).__name__
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return id(value.__code__), _key(cells, depth), _key(value.__defaults__, depth)
    if isinstance(value, type | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__name__, _key(getattr(value, "__dict__", {}), depth)


def _tensor_key(tensor: torch.Tensor) -> Hashable:
    """Returns a key of a tensor that is no parameter: with the values of positions and masks, not of statistics."""
    form = tuple(tensor.shape), tensor.dtype
    if not is_plain(tensor) or tensor.device.type == "meta" or not tensor.numel():
        return form
    value = tensor.detach()
    if value.is_floating_point() and not bool(((value == 0) | (value == 1)).all()):
        return form
    return *form, hash(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _plain_repr(tree: Any) -> str:
    if isinstance(tree, dict):
        return str({k: _plain_repr(v) for k, v in tree.items()})
    if isinstance(tree, (list, tuple)):
        return str([_plain_repr(v) for v in tree])
    return repr(tree) if isinstance(tree, (int, float, bool, str, type(None))) else type(tree).__name__
