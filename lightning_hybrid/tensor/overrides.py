"""The user's say in a tensor plan: patterns over module names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.tensor_plan import TensorPlan
from lightning_hybrid.tensor.probe import linear_dims

CHOICES = ("colwise", "rowwise", "replicate", "colwise_gather")


@dataclass(frozen=True)
class Overrides:
    """Module names by what the user wants of them."""

    wanted: dict[str, str] = field(default_factory=dict)

    def named(self, choice: str) -> set[str]:
        """The modules with this choice."""
        return {name for name, wanted in self.wanted.items() if wanted == choice}

    def replicated(self, name: str) -> bool:
        """Whether `name`, or a module that contains it, is kept replicated."""
        parts = name.split(".")
        return any(self.wanted.get(".".join(parts[: i + 1])) == "replicate" for i in range(len(parts)))

    def check(self, plan: TensorPlan) -> None:
        """Every wish must have come true.

        Raises:
            PartitionError: If one has not; says why.
        """
        colwise: set[str] = set()
        rowwise: set[str] = set()
        for unit, part in plan.units.items():
            prefix = f"{unit}." if unit else ""
            colwise |= {prefix + name for name in part.colwise}
            rowwise |= {prefix + name for name in part.rowwise}
        done = {"colwise": colwise, "rowwise": rowwise, "colwise_gather": set(plan.gathered)}
        for name, choice in self.wanted.items():
            if choice in done and name not in done[choice]:
                reason = plan.reasons.get(name) or self._reason_nearby(name, plan)
                raise PartitionError(
                    f"`tensor_plan`: `{name}` cannot be {choice!r} with tp={plan.size}: {reason}. Remove the entry, or "
                    "use 'replicate' or, for a module outside the blocks, 'colwise_gather'."
                )

    @staticmethod
    def _reason_nearby(name: str, plan: TensorPlan) -> str:
        parent = name.rpartition(".")[0]
        near = [f"`{n}`: {r}" for n, r in plan.reasons.items() if n.rpartition(".")[0] == parent]
        return "; ".join(near) or "no region of its block that gives the right numbers has it so"


def parse_overrides(root: nn.Module, overrides: Mapping[str, str] | None) -> Overrides:
    """Matches the patterns of `tensor_plan` with the modules of `root`; later patterns win.

    Raises:
        ValueError: If a pattern matches nothing or asks for something unknown.
    """
    wanted: dict[str, str] = {}
    modules = dict(root.named_modules())
    linears = [name for name, module in modules.items() if linear_dims(module) is not None]
    for pattern, choice in (overrides or {}).items():
        if choice not in CHOICES:
            raise ValueError(
                f"`tensor_plan`: the value of {pattern!r} must be one of {', '.join(map(repr, CHOICES))}. "
                f"Got {choice!r}."
            )
        gathers = [n for n, m in modules.items() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
        allowed = list(modules) if choice == "replicate" else linears + (gathers if choice == "colwise_gather" else [])
        matched = [name for name in allowed if name and fnmatchcase(name, pattern)]
        if not matched:
            kind = "module" if choice == "replicate" else "linear module"
            raise ValueError(
                f"`tensor_plan`: the pattern {pattern!r} matches no {kind}. Patterns are matched with whole names such "
                f"as {', '.join(repr(n) for n in linears[:3])}."
            )
        wanted.update(dict.fromkeys(matched, choice))
    return Overrides(wanted)
