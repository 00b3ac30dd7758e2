"""What a user asks for: a layout and everything that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_hybrid.spec.gradient_sync import GradientSync
from lightning_hybrid.spec.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for."""

    layout: Layout
    schedule: str
    microbatches: int | str
    tensor_plan: Mapping[str, str] | None
    cuts: tuple[int, ...] | None = None
    """Where pipeline stages begin, by number of the call in the step's trace; None: by FLOPs."""
    gradient_sync: GradientSync = GradientSync()
    """How replicas agree on gradients."""
    expert_orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By name of a module of experts: which expert stands at each place over the ranks of `ep`; else in their order."""
    expert_hosts: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """By name of a module of experts: the experts that each rank of `ep` computes; else those that it has."""
