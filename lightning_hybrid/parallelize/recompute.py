"""Activation checkpointing of blocks: the backward pass recomputes activations instead of storing them.

References:
    Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174 (whole blocks).
    Korthikanti et al., Reducing Activation Recomputation, arXiv:2205.05198, section 5 (selective recomputation).
    DeepSeek-V3, arXiv:2412.19437, section 3.2.3 (norms, up-projections of latents, SwiGLU), implemented in `_policy()`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_hybrid._torch_private import ATTENTION, GROUPED_MM
from lightning_hybrid.spec.plan import Recompute

_aten = torch.ops.aten
_MATMULS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, GROUPED_MM, _aten.convolution}
_CHEAP_SHARE = 0.25
"""A matmul over an inner dim of at most this share of the block's width is recomputed, since it costs little per output
element. In DeepSeek-V3 these are the up-projections of latents (512 and 1536 of 7168), not those of experts (2048)."""


def recomputed(call: Callable[..., Any], how: Recompute) -> Callable[..., Any]:
    """Returns `call`, a block, with recomputation of its activations in the backward pass.

    Args:
        call: The block.
        how: `"full"`: stores the block's input only. `"selective"`: stores results of matmuls and attention, except of
            matmuls over a small inner dim; everything else (norms, activations, casts) is recomputed.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        if how == "full":
            return checkpoint(call, *args, use_reentrant=False, **kwargs)
        contexts = partial(create_selective_checkpoint_contexts, _policy(_width((*args, *kwargs.values()))))
        return checkpoint(call, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


def _width(arguments: tuple[Any, ...]) -> int:
    """Returns the width of a block: the last dim of its first floating-point argument."""
    return next((x.shape[-1] for x in arguments if isinstance(x, Tensor) and x.is_floating_point() and x.ndim), 0)


def _policy(width: int) -> Callable[..., CheckpointPolicy]:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        packet = op.overloadpacket
        if packet in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if packet in _MATMULS:
            left = args[1] if packet in (_aten.addmm, _aten.baddbmm) else args[0]
            if packet is _aten.convolution or left.shape[-1] > _CHEAP_SHARE * width:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
