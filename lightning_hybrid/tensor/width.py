"""Tensors whose last dim reads as the width of one rank.

Hand-written attention often reads the width of all heads from its input (`batch, length, width = x.shape`) and reshapes
its divided tensors by that width. The input of such a module is replaced by a tensor whose last dim reads as the width
of one rank's heads; every operation uses the whole tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_hybrid._torch_private import tree_map_only

_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


class NarrowTensor(torch.Tensor):
    """A tensor whose last dim reads as `width`; operations run on `whole`."""

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
    """Returns `tensor` with a last dim that reads as `width`."""
    narrowed = tensor.as_subclass(NarrowTensor)
    narrowed.whole, narrowed.width = tensor, width
    return narrowed


def widen(tree: Any) -> Any:
    """Returns `tree` with the whole tensor in place of each `NarrowTensor`."""
    return tree_map_only(NarrowTensor, lambda tensor: tensor.whole, tree)


def add_narrowing(module: nn.Module, width: int, ranks: int, active: Any = None) -> list[RemovableHandle]:
    """Makes floating-point arguments of `module` whose last dim is `width` read as `width // ranks`.

    Args:
        module: The module.
        width: The width of all ranks together.
        ranks: Number of ranks.
        active: Returns True for calls whose arguments are replaced; None for all calls.
    """

    def narrowed(value: torch.Tensor) -> torch.Tensor:
        suits = value.dtype.is_floating_point and value.ndim > 1 and value.shape[-1] == width
        return narrow(value, width // ranks) if suits and not isinstance(value, NarrowTensor) else value

    def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
        return None if active is not None and not active() else tree_map_only(torch.Tensor, narrowed, (args, kwargs))

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        return None if active is not None and not active() else widen(output)

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
