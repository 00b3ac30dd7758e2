"""Random numbers that do not depend on how a batch is split: for steps that are compared with each other.

Dropout has no effect, and every other random tensor has equal rows. A step on a part of the batch, on another replica,
or on one process then computes with the same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 -- its usual name
from torch.overrides import TorchFunctionMode

from lightning_hybrid._torch_private import DispatchMode, recomputation_off
from lightning_hybrid.patching import patched
from lightning_hybrid.rng.step import StepRNG

_SETTINGS: dict[Any, dict[str, Any]] = {
    **dict.fromkeys(
        (
            F.dropout,
            F.dropout1d,
            F.dropout2d,
            F.dropout3d,
            F.alpha_dropout,
            F.feature_alpha_dropout,
        ),
        {"p": 0.0},
    ),
    F.rrelu: {"training": False},
    F.multi_head_attention_forward: {"dropout_p": 0.0},
}
"""Arguments of Python functions that switch their random numbers off."""
_POSITIONS: dict[Any, tuple[int, str]] = {
    torch.dropout: (1, "p"),
    torch.dropout_: (1, "p"),
    torch.alpha_dropout: (1, "p"),
    torch.feature_dropout: (1, "p"),
    torch.feature_alpha_dropout: (1, "p"),
    F.scaled_dot_product_attention: (4, "dropout_p"),
}
"""Position and name of the dropout probability in built-in functions."""
_FUNCTIONAL = [f for f in (*_SETTINGS, *_POSITIONS) if getattr(F, f.__name__, None) is f]
_SIGNATURES = {function: inspect.signature(function) for function in _SETTINGS}


class _NoDropout(TorchFunctionMode):
    """Sets the probability of dropout to 0."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _without_dropout(func, *args, **(kwargs or {}))


def _without_dropout(func: Any, *args: Any, **kwargs: Any) -> Any:
    if func in _SETTINGS:
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.arguments.update(_SETTINGS[func])
        return func(*bound.args, **bound.kwargs)
    if func in _POSITIONS:
        position, name = _POSITIONS[func]
        if len(args) > position:
            args = (*args[:position], 0.0, *args[position + 1 :])
        else:
            kwargs = {**kwargs, name: 0.0}
    return func(*args, **kwargs)


class _EqualRows(DispatchMode):
    """Draws one row of every random tensor, and repeats it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, torch.Tensor):
            if first.ndim == 0 or first.shape[0] < 2 or not _is_elementwise(func):
                return func(*args, **kwargs)
            if func.overloadpacket.__name__.endswith("_"):
                row = first[:1].clone()
                func(row, *args[1:], **kwargs)
                return first.copy_(row.expand_as(first))
            return func(first[:1], *args[1:], **kwargs).expand(first.shape).clone()
        sizes = [i for i, a in enumerate(args) if isinstance(a, list | tuple)]
        if not sizes or func.overloadpacket.__name__ not in ("rand", "randn", "randint", "normal"):
            return func(*args, **kwargs)
        at, size = sizes[0], list(args[sizes[0]])
        if not size or size[0] < 2:
            return func(*args, **kwargs)
        row = func(*args[:at], [1, *size[1:]], *args[at + 1 :], **kwargs)
        return row.expand(size).clone()


_ELEMENTWISE = (
    "rand_like",
    "randn_like",
    "randint_like",
    "bernoulli_",
    "uniform_",
    "normal_",
    "random_",
    "exponential_",
    "cauchy_",
    "geometric_",
    "log_normal_",
)


def _is_elementwise(func: Any) -> bool:
    return func.overloadpacket.__name__ in _ELEMENTWISE


@contextmanager
def common_randomness(root: nn.Module, rng: StepRNG, equal_rows: bool) -> Iterator[None]:
    """Makes steps in the context draw random numbers that do not depend on the layout.

    Args:
        root: The LightningModule.
        rng: The generators of the steps; afterwards `rng.has_drawn` tells whether steps draw random numbers.
        equal_rows: True if random tensors have equal rows. This slows a step down, since it sees every operator.
    """
    with ExitStack() as stack:
        for module in root.modules():
            if isinstance(module, nn.RNNBase):
                stack.enter_context(patched(module, dropout=0.0))
        stack.enter_context(rng.equal_on_all_ranks())
        stack.enter_context(_NoDropout())
        # modes do not see what is recomputed in the backward pass
        stack.enter_context(patched(F, **{f.__name__: partial(_without_dropout, f) for f in _FUNCTIONAL}))
        if equal_rows:
            stack.enter_context(recomputation_off())
            stack.enter_context(_EqualRows())
        yield
