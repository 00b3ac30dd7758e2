"""Plan of one module of experts on the `ep` axis: plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.tensor_plan import Path


@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """A module that is called with tokens, the experts chosen for each, and their weights.

    All its parameters have the experts along dim 0; it returns, for every token, the weighted sum over the experts
    chosen.
    """

    experts: int
    """Number of experts of the whole module, E."""
    tokens: Path
    """The argument of shape `(N, D)`."""
    index: Path
    """The argument of shape `(N, A)`: the experts chosen for each token."""
    weights: Path
    """The argument of shape `(N, A)`: factors of their outputs."""
    attributes: tuple[str, ...]
    """Integer attributes of the module that hold the number of experts."""
    order: tuple[int, ...] | None = None
    """The expert at each place, where places are divided over ranks in order; None: expert i is at place i."""
    hosts: tuple[tuple[int, ...], ...] | None = None
    """By rank, the experts that it computes; an expert of several ranks has copies, which share its tokens. None: each
    rank computes those that it holds."""

    def check(self, name: str, ranks: int) -> None:
        """Checks that order and hosts fit this module and the number of ranks.

        Raises:
            PartitionError: If they do not.
        """
        if self.order is not None and sorted(self.order) != list(range(self.experts)):
            raise PartitionError(
                f"`expert_orders` must have each of the {self.experts} experts of `{name}` once. Got {self.order}."
            )
        if self.hosts is None:
            return
        everywhere = {expert for hosted in self.hosts for expert in hosted}
        twice = any(len(set(hosted)) < len(hosted) for hosted in self.hosts)
        if len(self.hosts) != ranks or twice or everywhere != set(range(self.experts)):
            raise PartitionError(
                f"`expert_hosts` must have, for each of the {ranks} ranks of `ep`, the experts of `{name}` that it "
                f"computes, none twice, and each of the {self.experts} on some rank. Got {self.hosts}."
            )

    def computed(self, rank: int, ranks: int) -> Sequence[int]:
        """Returns the experts that `rank` of `ranks` computes."""
        return self.part(rank, ranks) if self.hosts is None else self.hosts[rank]

    def part(self, rank: int, ranks: int) -> Sequence[int]:
        """Returns the experts that `rank` of `ranks` holds, in the order of their places."""
        size = self.experts // ranks
        places = range(rank * size, (rank + 1) * size)
        return places if self.order is None else [self.order[place] for place in places]


def plan_of(plans: Mapping[str, ExpertPlan], parameter: str) -> ExpertPlan | None:
    """Returns the plan of the module that a parameter belongs to; None for parameters outside experts."""
    return plans.get(parameter.rpartition(".")[0])
