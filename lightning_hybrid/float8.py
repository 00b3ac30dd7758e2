"""FP8 training as in DeepSeek-V3: matmuls of linear layers in E4M3 with a scale for every block.

Activations and gradients are scaled per 1 x 128 elements, weights per 128 x 128, each by its current maximum. The
forward pass, the input gradient and the weight gradient are computed in FP8. Everything else stays in bfloat16 or
float32: embedding, head, router, norms, attention, and weights of other sizes.

Reference:
    DeepSeek-V3, arXiv:2412.19437, section 3.3. The kernels are torchao's (`torchao.prototype.blockwise_fp8_training`).
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_hybrid._lightning_private import PrecisionOfEither
from lightning_hybrid.spec.errors import PartitionError

BLOCK = 128
"""Elements of a scaling block along a dim: section 3.3.2."""
_CAPABILITY = (9, 0)
"""Compute capability of GPUs that multiply FP8 with a scale per block (H100)."""
Multiply = Callable[[Tensor, Tensor], Tensor]
"""Function `(x, weight) -> x @ weight.T` in FP8; the rows of `x` and both dims of `weight` are multiples of 128."""


class Float8Precision(PrecisionOfEither):
    """Precision plugin: `bf16-mixed` with linear layers in FP8: `Trainer(plugins=[Float8Precision()])`.

    Args:
        exclude: Name patterns of linear layers that stay in bfloat16.
    """

    def __init__(self, exclude: tuple[str, ...] = ("*head*", "*embed*", "*router*")) -> None:
        super().__init__("bf16-mixed", "cuda")
        self.exclude = tuple(exclude)
        self._taken: list[nn.Linear] = []

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Replaces the `forward` of the linear layers.

        Raises:
            PartitionError: If this device does not support FP8, or no layer has a suitable size.
        """
        multiply = _kernel()
        chosen = float8_linears(module, self.exclude)
        if not chosen:
            raise PartitionError(
                f"`Float8Precision` needs linear layers whose sizes are multiples of {BLOCK}. "
                f"{type(module).__name__} has none. Use `precision='bf16-mixed'`."
            )
        self.restore()
        for linear in chosen.values():
            linear.__dict__["forward"] = partial(float8_forward, linear, multiply)
            self._taken.append(linear)
        return module

    def restore(self) -> None:
        """Restores the original `forward` of the layers."""
        for linear in self._taken:
            linear.__dict__.pop("forward", None)
        self._taken.clear()

    @override
    def teardown(self) -> None:
        self.restore()
        super().teardown()


def float8_linears(module: nn.Module, exclude: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Returns, by name, the linear layers of suitable size that match no pattern of `exclude`."""
    return {
        name: child
        for name, child in module.named_modules()
        if type(child) is nn.Linear
        and child.in_features % BLOCK == child.out_features % BLOCK == 0
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }


def float8_forward(linear: nn.Linear, multiply: Multiply, x: Tensor) -> Tensor:
    """Computes a linear layer with `multiply`.

    Args:
        linear: The layer.
        multiply: The FP8 product, see `Multiply`.
        x: Input, of shape `(..., in_features)`.

    Returns:
        Output, of shape `(..., out_features)`, in bfloat16.
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    missing = -len(rows) % BLOCK
    if missing:  # rows of zeros change neither other rows nor the weight gradient, a sum over rows
        rows = F.pad(rows, (0, 0, 0, missing))
    y = multiply(rows.contiguous(), linear.weight.to(torch.bfloat16))
    y = y[: len(y) - missing].view(*x.shape[:-1], -1)
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def _kernel() -> Multiply:
    """Returns torchao's blockwise FP8 product.

    Raises:
        PartitionError: If the device does not support it, or torchao is missing.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < _CAPABILITY:
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        raise PartitionError(
            "`Float8Precision` needs a GPU that multiplies FP8 with a scale per block: compute capability 9.0 or "
            f"higher, such as an H100. Got {found}. Use `precision='bf16-mixed'`."
        )
    try:
        from torchao.prototype.blockwise_fp8_training.linear import fp8_blockwise_mm  # pyright: ignore
    except ImportError as error:
        raise PartitionError(
            "`Float8Precision` needs torchao for its kernels. Install it with `pip install 'lightning-hybrid[fp8]'`."
        ) from error

    def multiply(x: Tensor, weight: Tensor) -> Any:
        return fp8_blockwise_mm.apply(x, weight, BLOCK, torch.bfloat16)

    return multiply
