"""Private APIs of optimizers and of `GradScaler`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import utils

from lightning_hybrid.patching import patched


def agree_on_overflow(scaler: Any, reduce: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
    """Makes a `GradScaler` skip a step on all ranks if gradients overflow on any rank.

    The scaler's own check covers gradients of this rank only, and raises if the rank has none. Both ways of unscaling
    (before the step, or within a fused optimizer) call `_unscale_grads_`, which is replaced.

    Args:
        scaler: The scaler.
        reduce: Sums a tensor in place over all ranks.

    Returns:
        A function that restores the scaler.
    """

    def unscale(
        optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            if not allow_fp16 and parameter.grad.dtype == torch.float16:
                raise ValueError("Attempting to unscale FP16 gradients.")
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            by_dtype.setdefault(gradient.dtype, []).append(gradient._values() if gradient.is_sparse else gradient)
        for gradients in by_dtype.values():
            check: Any = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]
            check(gradients, found_inf, inv_scale)
        reduce(found_inf)
        return {found_inf.device: found_inf}

    scaler.__dict__["_unscale_grads_"] = unscale
    return lambda: scaler.__dict__.pop("_unscale_grads_", None)


def clipping_functions() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Returns `get_total_norm`, `clip_grads_with_norm_` and `clip_grad_value_`."""
    module: Any = utils.clip_grad
    return module._get_total_norm, module._clip_grads_with_norm_, module.clip_grad_value_


@contextmanager
def replaced_clipping_functions(
    get_total_norm: Callable[..., Any], clip_with_norm: Callable[..., Any], clip_value: Callable[..., Any]
) -> Iterator[None]:
    """Replaces the functions of `clipping_functions`, and with the first two `clip_grad_norm_`, however imported."""
    private = {"_get_total_norm": get_total_norm, "_clip_grads_with_norm_": clip_with_norm}
    public = {"get_total_norm": get_total_norm, "clip_grads_with_norm_": clip_with_norm}
    with (
        patched(utils.clip_grad, **private, clip_grad_value_=clip_value),
        patched(utils, **public, clip_grad_value_=clip_value),
    ):
        yield


def step_without_hooks(optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> None:
    """Runs the step of `optimizer` without its hooks and without the wrappers of learning-rate schedulers."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer, closure)


def unscales_itself(optimizer: Any) -> bool:
    """Returns True if the optimizer divides gradients by the loss scale in its step, as fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
