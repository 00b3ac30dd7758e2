"""Tensor-parallel plans: plain data, no torch.

All names are full names from the root module. A plan is equal on every rank, so it is applied without communication.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

Path = tuple[str | int, ...]
CHOICES = ("colwise", "rowwise", "replicate", "colwise_gather")
"""Choices of `tensor_plan` for a module."""
_RENAMED = {"column": "colwise", "row": "rowwise", "column_gather": "colwise_gather"}


def renamed_choices(tensor_plan: Mapping[str, str] | None) -> dict[str, str] | None:
    """Replaces words of `tensor_plan` that have been renamed, and warns once for each.

    Raises:
        ValueError: If `tensor_plan` is no mapping, or has a choice that does not exist.
    """
    if tensor_plan is None:
        return None
    if not isinstance(tensor_plan, Mapping):
        raise ValueError(
            "`tensor_plan` must be a mapping of names of modules to choices, such as {'*attention': 'replicate'}. Got "
            f"{tensor_plan!r}."
        )
    for pattern, choice in tensor_plan.items():
        if choice not in (*CHOICES, *_RENAMED):
            near = get_close_matches(str(choice), CHOICES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"`tensor_plan` must give each module one of {', '.join(CHOICES)}. Got {choice!r} for "
                f"{pattern!r}.{hint}"
            )
    for old in dict.fromkeys(choice for choice in tensor_plan.values() if choice in _RENAMED):
        warnings.warn(
            f"`tensor_plan`: {old!r} is now {_RENAMED[old]!r}. Write {_RENAMED[old]!r}; the next release refuses "
            f"{old!r}.",
            DeprecationWarning,
            stacklevel=3,
        )
    return {pattern: _RENAMED.get(choice, choice) for pattern, choice in tensor_plan.items()}


def one_of_many(name: str) -> str:
    """Returns a module name with `*` for the numbers of list elements that contain it."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


@dataclass(frozen=True, kw_only=True)
class ShardedParameter:
    """Sharding of one dim of a weight over the ranks of the `tp` axis."""

    dim: int
    """The dim that is divided."""
    size: int
    """Full length of the dim; a multiple of the axis size."""
    order: tuple[int, ...] | None = None
    """The permutation of the dim after which every rank's part is contiguous; None if it is so without one."""

    def part(self, rank: int, ranks: int) -> tuple[int, ...]:
        """Returns the indices of the full dim that belong to `rank`, in ascending order of the permuted dim."""
        length = self.size // ranks
        indices = self.order if self.order is not None else range(self.size)
        return tuple(indices[rank * length : (rank + 1) * length])


@dataclass(frozen=True, kw_only=True)
class SlicedArgument:
    """A floating-point argument of a unit of which each rank uses its own part (attention biases by head)."""

    path: Path
    """Path of the argument: `("args", 0, ...)` or `("kwargs", "name", ...)`, then indices into containers."""
    dim: int
    owners: tuple[int, ...]
    """The rank that uses index i is `owners[i % len(owners)]`; the period lets the batch size change."""


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """The tensor parallelism inside one unit; names are relative to the unit."""

    colwise: tuple[str, ...] = ()
    """Linears whose output channels are divided: input replicated, output local."""
    rowwise: tuple[str, ...] = ()
    """Linears whose input channels are divided: input local, output summed over the ranks."""
    regions: tuple[tuple[str, ...], ...] = ()
    """The linears of each region, rowwise ones first: either all of them are parallel, or none."""
    parameters: dict[str, ShardedParameter] = field(default_factory=dict)
    buffers: dict[str, ShardedParameter] = field(default_factory=dict)
    partial: tuple[str, ...] = ()
    """Replicated parameters used inside a region: each rank has a part of the gradient."""
    shared_outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Replicated linears of which these output channels are used inside a region."""
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Integer attributes (numbers of heads, widths) by module, with their value on each rank."""
    selected_outputs: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Replicated linears of which each rank uses these output channels, by rank (fewer key heads than ranks)."""
    widths: dict[str, int] = field(default_factory=dict)
    """Modules that read a width from the shape of their input, with the width, which must read as a rank's part."""
    slices: tuple[SlicedArgument, ...] = ()
    shared_arguments: tuple[Path, ...] = ()
    """Arguments used whole inside a region: each rank has a part of the gradient."""


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """Sharding of every weight of a model over the `tp` axis, and the modules that communicate."""

    size: int
    """Ranks on the axis."""
    units: dict[str, UnitPlan] = field(default_factory=dict)
    """Plans of all units by name, including units without tensor parallelism."""
    parameters: dict[str, ShardedParameter] = field(default_factory=dict)
    """Every divided parameter, under each of its names."""
    embeddings: tuple[str, ...] = ()
    """Embeddings divided by rows (vocabulary-parallel)."""
    gathered: tuple[str, ...] = ()
    """Linears or convolutions with divided output channels whose output is gathered again."""
    attention: tuple[str, ...] = ()
    """`nn.MultiheadAttention` modules divided by heads."""
    used_outside: tuple[str, ...] = ()
    """Whole parameters of units that are used outside their unit, too."""
    written: tuple[str, ...] = ()
    """Parameters that the step writes in place, which stay whole."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Reason why a module stays replicated, by name."""
    sharded_elements: int = 0
    """Elements of the divided parameters; shared parameters count once."""
    total_elements: int = 0

    @property
    def fraction(self) -> float:
        """The fraction of the parameter elements that is divided."""
        return self.sharded_elements / max(self.total_elements, 1)

    def modules(self) -> dict[str, str]:
        """Returns for each divided module how it is divided: `colwise`, `rowwise`, `by channel` and others."""
        found: dict[str, str] = {}
        for unit, plan in self.units.items():
            prefix = f"{unit}." if unit else ""
            found |= {prefix + name: "colwise" for name in plan.colwise}
            found |= {prefix + name: "rowwise" for name in plan.rowwise}
            for name in plan.parameters:
                owner = (prefix + name).rpartition(".")[0]
                found.setdefault(owner, "by channel")
        found |= dict.fromkeys(self.embeddings, "vocabulary")
        found |= dict.fromkeys(self.gathered, "colwise_gather")
        found |= dict.fromkeys(self.attention, "attention heads")
        return {name: how for name, how in found.items() if not self._inside_attention(name)}

    def _inside_attention(self, name: str) -> bool:
        return any(name.startswith(f"{attention}.") for attention in self.attention)

    def rows(self) -> list[tuple[str, str]]:
        """Returns rows of a table: (modules, how they are divided), with `*` for block numbers."""
        counts: dict[tuple[str, str], int] = {}
        for name, how in self.modules().items():
            key = one_of_many(name), how
            counts[key] = counts.get(key, 0) + 1
        rows = [(f"{count} x {name}" if count > 1 else name, f"tp: {how}") for (name, how), count in counts.items()]
        return [*rows, ("fraction of the parameters", f"tp: {self.fraction:.0%} divided")]
