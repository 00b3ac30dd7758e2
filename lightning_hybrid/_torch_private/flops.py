"""Floating point operations of torch's operators."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_hybrid._torch_private.autograd import in_backward
from lightning_hybrid._torch_private.dispatch import FLASH_ATTENTION_CPU, FLASH_ATTENTION_CPU_BACKWARD, GROUPED_MM

_CHECKPOINT = torch.utils.checkpoint.__file__


def flops_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> float:
    """Returns the floating point operations of a call of an operator; 0 for those without matrix products.

    A multiplication and an addition count as two. As in torch's `FlopCounterMode`, masks of attention do not count.
    """
    count = flop_registry.get(func.overloadpacket)
    if count is not None:
        return count(*args, **kwargs, out_val=out)
    if func.overloadpacket is GROUPED_MM:
        return 2 * args[0].numel() * args[1].shape[-1]  # each row goes to one group
    if func.overloadpacket is FLASH_ATTENTION_CPU:
        return 4 * args[0].numel() * args[1].shape[-2]
    if func.overloadpacket is FLASH_ATTENTION_CPU_BACKWARD:  # five products, where the forward pass has two
        return 10 * args[1].numel() * args[2].shape[-2]
    return 0


class FlopCount(TorchDispatchMode):
    """Counts the floating point operations of all operators that run within the context, which may be entered again."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        """Operations of forward and backward passes."""
        self.recomputed_flops = 0.0
        """Operations of activation checkpointing, which computes parts of the forward pass again."""
        self._depth = 0

    def __enter__(self) -> Any:
        self._depth += 1
        return super().__enter__() if self._depth == 1 else self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts its operations."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls the operator on its part next
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        flops = flops_of(func, args, kwargs, out)
        if flops and _recomputes():
            self.recomputed_flops += flops
        else:
            self.flops += flops
        return out


def _recomputes() -> bool:
    """Returns True within a recomputation of `torch.utils.checkpoint`, during a backward pass."""
    if not (in_backward() and torch.is_grad_enabled()):
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT and frame.f_code.co_name in ("recompute_fn", "backward"):
            return True
        frame = frame.f_back
    return False


def has_compiled_parts(module: nn.Module) -> bool:
    """Returns True if a part of `module` is the result of `torch.compile`."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # nothing is compiled before it has been imported
    return dynamo is not None and any(isinstance(m, dynamo.OptimizedModule) for m in module.modules())
