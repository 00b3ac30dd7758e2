"""Options of gradient synchronization between replicas: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_hybrid.spec.checks import check_at_least
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

SyncKind = Literal["exact", "bf16", "bf16_fp32acc", "hierarchical", "diloco"]
SYNC_KINDS: tuple[SyncKind, ...] = ("exact", "bf16", "bf16_fp32acc", "hierarchical", "diloco")


@dataclass(frozen=True, kw_only=True)
class GradientSync:
    """Options of gradient synchronization: the dtype that is sent, and the order of sums.

    Raises:
        ValueError: If a value is not one of its possible values.
    """

    kind: SyncKind = "exact"
    """`exact`: in the gradients' dtype. `bf16`: sent and summed in bfloat16. `bf16_fp32acc`: sent in bfloat16, summed
    in float32. `hierarchical`: exact, within a node first. `diloco`: no synchronization of gradients; replicas of `dp`
    step independently and average their weights every `every_n_steps` steps."""
    inner: int | None = None
    """For `hierarchical`: number of neighboring replicas; None: those of a node."""
    every_n_steps: int = 10
    """For `diloco`: H, steps between two averages."""
    outer_learning_rate: float = 0.7
    """For `diloco`: learning rate of the outer SGD."""
    outer_momentum: float = 0.5
    """For `diloco`: Nesterov momentum of the outer SGD. The paper's 0.9 helps only after many averages."""

    def __post_init__(self) -> None:
        if self.kind not in SYNC_KINDS:
            raise ValueError(f"`gradient_sync` must be one of {', '.join(SYNC_KINDS)}. Got {self.kind!r}.")
        if self.inner is not None and (self.kind != "hierarchical" or self.inner < 1):
            raise ValueError(
                f"`inner` is the number of neighbors of 'hierarchical', at least 1. Got {self.inner} with "
                f"'{self.kind}'."
            )

        check_at_least(self, 1, "every_n_steps")
        if not self.outer_learning_rate > 0:
            raise ValueError(f"`outer_learning_rate` must be above 0. Got {self.outer_learning_rate}.")
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"`outer_momentum` must be at least 0 and below 1. Got {self.outer_momentum}.")

    @classmethod
    def of(cls, value: str | GradientSync) -> GradientSync:
        """Returns the options for `value`, which may be the name of a kind."""
        return value if isinstance(value, GradientSync) else cls(kind=value)  # type: ignore[arg-type] -- checked there

    def check(self, layout: Layout) -> None:
        """Checks that `kind` works under a layout.

        Raises:
            PartitionError: If it does not.
        """
        short = self.kind in ("bf16", "bf16_fp32acc")
        if short and layout.fsdp > 1 and layout.dp > 1:
            raise PartitionError(
                f"`gradient_sync='{self.kind}'` under `layout='{layout}'`: gradients of sharded replicas are scattered "
                "over `fsdp` and then summed over `dp`, which torch does in their own dtype. Use a layout with one of "
                f"the two, such as '{layout.moved('dp', 'fsdp')}', or 'exact'."
            )
        if self.kind == "hierarchical" and (layout.fsdp > 1 or layout.ep > 1):
            raise PartitionError(
                f"`gradient_sync='hierarchical'` under `layout='{layout}'`: with `fsdp` gradients are summed over "
                "its ranks first and then over `dp` already, and with `ep` experts have other replicas. Use 'exact', "
                "with `fsdp` within a node and `dp` across."
            )
        if self.kind == "diloco" and layout.fsdp * layout.ep > 1:
            raise PartitionError(
                f"`gradient_sync='diloco'` under `layout='{layout}'`: replicas of `fsdp` and `ep` share weights in "
                f"every step, so they cannot step independently. Use a layout of `dp`, `tp` and `pp`."
            )
        if self.kind == "hierarchical" and self.inner is not None and layout.dp % self.inner:
            raise PartitionError(
                f"`gradient_sync`: `inner={self.inner}` must divide the replicas, and `layout='{layout}'` has "
                f"{layout.dp} of them."
            )
