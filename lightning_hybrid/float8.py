"""FP8 training as in DeepSeek-V3: matmuls of linear layers in E4M3 with a scale for every block.

Activations and gradients are scaled by 1 x 128 elements, weights by 128 x 128, each by its present largest value;
forward, the gradient of the input and that of the weight are all computed so. Everything else stays in bfloat16 or
float32: embedding, head, router, norms, attention, and weights that have other sizes.

Reference:
    DeepSeek-V3, arXiv:2412.19437, section 3.3. The kernels are torchao's (`torchao.prototype.blockwise_fp8_training`).
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_hybrid.spec.errors import PartitionError

BLOCK = 128
"""Elements of a block along each dim that is scaled in blocks: section 3.3.2."""
_CAPABILITY = (9, 0)
"""Of a GPU that multiplies with a scale for every block (H100)."""
Multiply = Callable[[Tensor, Tensor], Tensor]
"""`x @ weight.T` in FP8, of `x` with rows in multiples of 128 and a weight with both dims in multiples of 128."""


class Float8Precision(MixedPrecision):
    """Lightning's `bf16-mixed`, with the linear layers of FP8: `Trainer(plugins=[Float8Precision()])`.

    Args:
        exclude: Patterns of names of linear layers that stay in bfloat16.
    """

    def __init__(self, exclude: tuple[str, ...] = ("*head*", "*embed*", "*router*")) -> None:
        super().__init__("bf16-mixed", "cuda")
        self.exclude = tuple(exclude)
        self._taken: list[nn.Linear] = []

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Takes over the linear layers.

        Raises:
            PartitionError: If this machine can't, or no layer has a fitting size.
        """
        multiply = _kernel()
        chosen = float8_linears(module, self.exclude)
        if not chosen:
            raise PartitionError(
                f"`Float8Precision` needs linear layers whose sizes are multiples of {BLOCK}, of which "
                f"{type(module).__name__} has none. Use `precision='bf16-mixed'`."
            )
        self.restore()
        for linear in chosen.values():
            linear.__dict__["forward"] = partial(float8_forward, linear, multiply)
            self._taken.append(linear)
        return module

    def restore(self) -> None:
        """Gives the layers their own `forward` back."""
        for linear in self._taken:
            linear.__dict__.pop("forward", None)
        self._taken.clear()

    @override
    def teardown(self) -> None:
        self.restore()
        super().teardown()


def float8_linears(module: nn.Module, exclude: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers of a module that can and shall be computed in FP8, by name."""
    return {
        name: child
        for name, child in module.named_modules()
        if type(child) is nn.Linear
        and child.in_features % BLOCK == child.out_features % BLOCK == 0
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }


def float8_forward(linear: nn.Linear, multiply: Multiply, x: Tensor) -> Tensor:
    """A linear layer by `multiply`.

    Args:
        linear: The layer.
        multiply: See `Multiply`.
        x: Of shape `(..., in_features)`.

    Returns:
        Of shape `(..., out_features)`, in bfloat16.
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    missing = -len(rows) % BLOCK
    if missing:  # rows of zeros change no other row, nor the sum over rows that is the weight's gradient
        rows = F.pad(rows, (0, 0, 0, missing))
    y = multiply(rows.contiguous(), linear.weight.to(torch.bfloat16))
    y = y[: len(y) - missing].view(*x.shape[:-1], -1)
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def _kernel() -> Multiply:
    """The product in blocks, by torchao.

    Raises:
        PartitionError: If the device can't run it, or torchao is missing.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < _CAPABILITY:
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        raise PartitionError(
            "`Float8Precision` needs a GPU that multiplies FP8 with a scale for every block: compute capability 9.0 or "
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
