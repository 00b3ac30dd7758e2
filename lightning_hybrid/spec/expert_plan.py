"""How one module of experts is divided over the `ep` axis: plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_hybrid.spec.tensor_plan import Path


@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """A module that is called with tokens, the experts chosen for each, and their weights.

    All its parameters have the experts along dim 0; it returns, for every token, the weighted sum over the experts
    chosen.
    """

    experts: int
    """Experts of the whole module, E."""
    tokens: Path
    """The argument of shape `(N, D)`."""
    index: Path
    """The argument of shape `(N, A)`: the experts chosen for each token."""
    weights: Path
    """The argument of shape `(N, A)`: factors of their outputs."""
    attributes: tuple[str, ...]
    """Integer attributes of the module that hold the number of experts."""
    order: tuple[int, ...] | None = None
    """Which expert stands at each place, places being shared out in order; None: each at the place of its number."""

    def part(self, rank: int, ranks: int) -> Sequence[int]:
        """The experts that `rank` of `ranks` holds, in the order of their places."""
        size = self.experts // ranks
        places = range(rank * size, (rank + 1) * size)
        return places if self.order is None else [self.order[place] for place in places]


def plan_of(plans: Mapping[str, ExpertPlan], parameter: str) -> ExpertPlan | None:
    """The plan of the module that a parameter belongs to; None if it is no expert's."""
    return plans.get(parameter.rpartition(".")[0])
