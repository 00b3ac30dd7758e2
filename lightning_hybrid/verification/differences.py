"""Differences of two steps, and the bounds that they must keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from torch import Tensor

from lightning_hybrid._torch_private import DispatchMode
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.float8 import Float8Precision
from lightning_hybrid.ghosts.trees import tensors_of
from lightning_hybrid.replicas.reducer import in_buckets

_EXACT_BOUND = 1e-3
"""Bound of relative differences in single precision. Sums in another order differ by about 1e-6 to 1e-5; empirical."""
_FLOAT8_BOUND = 0.25
"""Bound of relative differences where matmuls compute in 8 bits; empirical."""
_ROUNDINGS = 16
"""Bound for lower precision, as a multiple of its relative rounding error; empirical."""
_NEGLIGIBLE = 1e-3
"""Norm of a gradient, relative to that of all gradients, below which its own norm is no measure; empirical."""


def bound_of(dtype: torch.dtype) -> float:
    """Returns the largest relative difference of equal steps that compute in `dtype`."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return _EXACT_BOUND
    return max(_EXACT_BOUND, _ROUNDINGS * torch.finfo(dtype).eps)


def step_bound(engine: Engine) -> float:
    """Returns the bound of relative differences for the precision of the run."""
    precision, parameters = engine.run.precision, engine.partition.parameters
    dtypes = {parameters[name].dtype for name in parameters.names}
    if isinstance(precision, Float8Precision):
        return _FLOAT8_BOUND
    if isinstance(precision, MixedPrecision | HalfPrecision):
        dtypes.add(torch.bfloat16 if "bf16" in str(precision.precision) else torch.float16)
    if engine.plan.gradient_sync.kind in ("bf16", "bf16_fp32acc"):
        dtypes.add(torch.bfloat16)
    return max(map(bound_of, dtypes), default=bound_of(torch.float32))


class ComputedIn(DispatchMode):
    """Notes the dtypes of floating point numbers that operators compute in, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.dtypes |= {t.dtype for t in tensors_of(out) if t.is_floating_point()}
        return out


@dataclass
class Differences:
    """Relative differences of a step from that of one process."""

    loss: float = 0.0
    found_loss: float = 0.0
    expected_loss: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    """By name of the parameter, in the order of the model."""

    @property
    def largest(self) -> float:
        """The largest difference; NaN if a value is not finite on one side only."""
        values = [self.loss, *self.gradients.values()]
        return math.nan if any(map(math.isnan, values)) else max(values)

    def beyond(self, bound: float) -> list[str]:
        """Returns the names of the parameters whose gradients differ by more than `bound`."""
        return [name for name, value in self.gradients.items() if not value <= bound]

    def within(self, bound: float) -> bool:
        """Returns True if no difference is larger than `bound`."""
        return self.loss <= bound and not self.beyond(bound)


def relative(found: float, expected: float) -> float:
    """Returns the difference of two losses relative to `expected`; 0 if both are equal or not finite."""
    if found == expected or not (math.isfinite(found) or math.isfinite(expected)):
        return 0.0
    return abs(found - expected) / max(abs(expected), 1e-6)


def differences(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], names: Iterable[str]
) -> dict[str, float]:
    """Returns the norm of the difference of each gradient in `names`, relative to the norm of the expected one.

    A gradient that is missing on one side counts as zero. The norm of a negligible gradient is replaced by a small
    part of the norm of all gradients, since rounding errors of the whole step reach it.
    """
    norms = {n: 0.0 if g is None else float(_norm(g)) for n, g in expected.items()}
    floor = _NEGLIGIBLE * math.sqrt(sum(x * x for x in norms.values()))
    return {n: _difference(found.get(n), expected.get(n), max(norms.get(n, 0.0), floor)) for n in names}


def of_written(found: Tensor, expected: Tensor, before: Tensor) -> float:
    """Returns the difference of two values that a step has given a weight, relative to what the step changes.

    A write counts as at least a hundredth of the weight, since its rounding errors are those of the weight. The result
    is infinity if a value is not finite on one side only.
    """
    finite = [math.isfinite(float(_norm(tensor))) for tensor in (found, expected)]
    if not all(finite):
        return math.inf if any(finite) else 0.0
    scales = float(_norm(expected - before)), 0.01 * float(_norm(before))
    return _difference(found, expected, max(filter(math.isfinite, scales), default=float(_norm(expected))))


def mean_over(group: dist.ProcessGroup, tensors: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Returns the sums of `share` x tensor over the ranks of `group`, by name. Collective."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    means: dict[str, Tensor] = {}
    for bucket in in_buckets(tensors.values()):
        flat = torch.cat([t.reshape(-1) for t in bucket]) * share
        dist.all_reduce(torch.view_as_real(flat) if flat.is_complex() else flat, group=group)
        parts = flat.split([t.numel() for t in bucket])
        means |= {names[id(t)]: part.view(t.shape) for t, part in zip(bucket, parts, strict=True)}
    return means


def _difference(found: Tensor | None, expected: Tensor | None, scale: float) -> float:
    if found is None and expected is None:
        return 0.0
    given = [g for g in (found, expected) if g is not None]
    error = _norm(given[0]) if len(given) < 2 else _norm(given[0].to(given[1].dtype) - given[1])
    value = float(error)
    if not math.isfinite(value):  # both not finite: the step of one process is no better
        return 0.0 if len(given) == 2 and all(not bool(torch.isfinite(_norm(g))) for g in given) else math.nan
    return value / scale if scale else (0.0 if value == 0.0 else math.inf)


def _norm(tensor: Tensor) -> Tensor:
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return torch.linalg.vector_norm(tensor.to(dtype))
