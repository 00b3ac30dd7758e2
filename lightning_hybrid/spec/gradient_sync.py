"""How replicas agree on gradients: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

SyncKind = Literal["exact", "bf16", "bf16_fp32acc", "hierarchical"]
SYNC_KINDS: tuple[SyncKind, ...] = ("exact", "bf16", "bf16_fp32acc", "hierarchical")


@dataclass(frozen=True, kw_only=True)
class GradientSync:
    """What is sent, and how it is added up.

    Raises:
        ValueError: If a value is not one of its possible values.
    """

    kind: SyncKind = "exact"
    """`exact`: in the gradients' own type. `bf16`: sent and added up in bfloat16. `bf16_fp32acc`: sent in bfloat16,
    added up in float32. `hierarchical`: exactly, within a node first."""
    inner: int | None = None
    """For `hierarchical`: replicas that are neighbours; None: those of a node."""

    def __post_init__(self) -> None:
        if self.kind not in SYNC_KINDS:
            raise ValueError(f"`gradient_sync` must be one of {', '.join(SYNC_KINDS)}. Got {self.kind!r}.")
        if self.inner is not None and (self.kind != "hierarchical" or self.inner < 1):
            raise ValueError(
                f"`inner` is the number of neighbours of 'hierarchical', at least 1. Got {self.inner} with "
                f"'{self.kind}'."
            )

    @classmethod
    def of(cls, value: str | GradientSync) -> GradientSync:
        """From the name of a kind."""
        return value if isinstance(value, GradientSync) else cls(kind=value)  # type: ignore[arg-type] -- checked there

    def check(self, layout: Layout) -> None:
        """Whether it can work under a layout.

        Raises:
            PartitionError: If not.
        """
        short = self.kind in ("bf16", "bf16_fp32acc")
        if short and layout.fsdp > 1 and layout.dp > 1:
            raise PartitionError(
                f"`gradient_sync='{self.kind}'` under `layout='{layout}'`: gradients of sharded replicas are scattered "
                "over `fsdp` and then added up over `dp`, which torch does in their own type. Use a layout with one of "
                f"the two, such as '{layout.moved('dp', 'fsdp')}', or 'exact'."
            )
        if self.kind == "hierarchical" and (layout.fsdp > 1 or layout.ep > 1):
            raise PartitionError(
                f"`gradient_sync='hierarchical'` under `layout='{layout}'`: with `fsdp` gradients are added up over "
                "its ranks first and over `dp` then anyway, and with `ep` experts have other replicas. Use 'exact', "
                "with `fsdp` within a node and `dp` across."
            )
        if self.kind == "hierarchical" and self.inner is not None and layout.dp % self.inner:
            raise PartitionError(
                f"`gradient_sync`: `inner={self.inner}` must divide the replicas, and `layout='{layout}'` has "
                f"{layout.dp} of them."
            )
