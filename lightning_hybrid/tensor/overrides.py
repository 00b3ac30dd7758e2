"""Choices of the user (`tensor_plan`): patterns over module names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.tensor_plan import TensorPlan
from lightning_hybrid.tensor.probe import linear_dims


@dataclass(frozen=True)
class Overrides:
    """The choice of the user for each named module."""

    choices: dict[str, str] = field(default_factory=dict)

    def named(self, choice: str) -> set[str]:
        """Returns the names of the modules with this choice."""
        return {name for name, chosen in self.choices.items() if chosen == choice}

    def replicated(self, name: str) -> bool:
        """Returns True if the choice for `name`, or for a module that contains `name`, is `"replicate"`."""
        parts = name.split(".")
        return any(self.choices.get(".".join(parts[: i + 1])) == "replicate" for i in range(len(parts)))

    def check(self, plan: TensorPlan) -> None:
        """Checks that `plan` follows every choice.

        Raises:
            PartitionError: If an entry of `tensor_plan` was not applied; the message is the reason.
        """
        colwise: set[str] = set()
        rowwise: set[str] = set()
        for unit, part in plan.units.items():
            prefix = f"{unit}." if unit else ""
            colwise |= {prefix + name for name in part.colwise}
            rowwise |= {prefix + name for name in part.rowwise}
        done = {"colwise": colwise, "rowwise": rowwise, "colwise_gather": set(plan.gathered)}
        for name, choice in self.choices.items():
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
        return "; ".join(near) or "no region of its block with this choice computes correct values"


def parse_overrides(root: nn.Module, overrides: Mapping[str, str] | None) -> Overrides:
    """Matches the patterns of `tensor_plan` with the modules of `root`; later patterns win.

    Raises:
        ValueError: If a pattern matches no module.
    """
    choices: dict[str, str] = {}
    modules = dict(root.named_modules())
    linears = [name for name, module in modules.items() if linear_dims(module) is not None]
    for pattern, choice in (overrides or {}).items():
        gathers = [n for n, m in modules.items() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
        allowed = list(modules) if choice == "replicate" else linears + (gathers if choice == "colwise_gather" else [])
        matched = [name for name in allowed if name and fnmatchcase(name, pattern)]
        if not matched:
            kind = "module" if choice == "replicate" else "linear module"
            raise ValueError(
                f"`tensor_plan`: the pattern {pattern!r} matches no {kind}. Patterns are matched with whole names such "
                f"as {', '.join(repr(n) for n in linears[:3])}."
            )
        choices.update(dict.fromkeys(matched, choice))
    return Overrides(choices)
