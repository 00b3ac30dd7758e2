"""Tensors that report a rank's width.

Hand-written attention often reads the width of all heads from its input (`batch, length, width = x.shape`) and reshapes
its own, divided, tensors by it. There such a module gets its input as a tensor whose last dim reads as the width of one
rank's heads; for every other purpose it is the whole tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


class NarrowTensor(torch.Tensor):
    """See the module docstring; any operation on it is done on `whole`."""

    whole: torch.Tensor
    width: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (_SHAPE, torch.Tensor.size) and isinstance(args[0], NarrowTensor):
            whole = args[0].whole
            shape = torch.Size([*whole.shape[:-1], args[0].width])
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if dim is None else shape[dim]
        return func(*widen(args), **widen(kwargs))


def narrow(tensor: torch.Tensor, width: int) -> NarrowTensor:
    """`tensor` with its last dim reading as `width`."""
    narrowed = tensor.as_subclass(NarrowTensor)
    narrowed.whole, narrowed.width = tensor, width
    return narrowed


def widen(tree: Any) -> Any:
    """`tree` with plain tensors again."""
    return tree_map_only(NarrowTensor, lambda tensor: tensor.whole, tree)


def add_narrowing(module: nn.Module, width: int, ranks: int, active: Any = None) -> list[RemovableHandle]:
    """Floating-point arguments of `module` whose last dim is `width` read as a rank's part of it.

    Args:
        module: The module.
        width: The width of all ranks together.
        ranks: Number of ranks.
        active: Tells at each call whether to do it; None for always.
    """

    def narrowed(value: torch.Tensor) -> torch.Tensor:
        suits = value.dtype.is_floating_point and value.ndim > 1 and value.shape[-1] == width
        return narrow(value, width // ranks) if suits and not isinstance(value, NarrowTensor) else value

    def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
        return None if active is not None and not active() else tree_map_only(torch.Tensor, narrowed, (args, kwargs))

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        return None if active is not None and not active() else widen(output)

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
