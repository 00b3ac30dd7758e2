"""Copies of experts: a rank computes experts of other ranks, too, which so share the tokens of a hot one.

A copy is there for one forward and backward pass: the weights come from the rank that has the expert, the gradients go
back and are added to those of its own tokens. Parameters, optimizers and checkpoints know of one expert only.

Reference: He et al., FasterMoE, PPoPP 2022, section 4.2 (shadowed experts: their weights go to the tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hybrid.experts.all_to_all import exchange_rows
from lightning_hybrid.spec.expert_plan import ExpertPlan


class ExpertCopies:
    """Where the experts of one module are computed, and their weights on this rank.

    Every rank has as many places: those of its own experts in their order, then those of copies. A place without one
    gets no tokens.

    Args:
        plan: How the module is divided.
        hosts: By rank, the experts that it computes.
        group: The ranks of the `ep` axis.
    """

    def __init__(self, plan: ExpertPlan, hosts: Sequence[Sequence[int]], group: dist.ProcessGroup) -> None:
        rank, ranks = group.rank(), group.size()
        self._group = group
        parts = [list(plan.part(r, ranks)) for r in range(ranks)]
        owner = {expert: r for r, part in enumerate(parts) for expert in part}
        foreign = [
            sorted((e for e in hosted if owner[e] != r), key=lambda e: (owner[e], e)) for r, hosted in enumerate(hosts)
        ]
        self.experts = len(parts[rank]) + len(foreign[rank])
        """That this rank has the weights of in a pass."""
        self.places = len(parts[rank]) + max(map(len, foreign))
        """Of each rank."""
        given = [[parts[rank].index(e) for e in of_rank if owner[e] == rank] for of_rank in foreign]
        self._sent = [len(rows) for rows in given]
        self._received = [sum(owner[e] == r for e in foreign[rank]) for r in range(ranks)]
        self._given = torch.tensor([row for rows in given for row in rows], dtype=torch.long)
        places: list[list[int]] = [[] for _ in range(plan.experts)]
        for r, hosted in enumerate(hosts):
            slots = parts[r] + foreign[r]
            for expert in hosted:
                places[expert].append(r * self.places + slots.index(expert))
        self._copies_E = torch.tensor([len(p) for p in places])
        most = max(map(len, places))
        self._places_EC = torch.tensor([p + p[:1] * (most - len(p)) for p in places])

    def choose(self, index_M: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Where the chosen experts are computed; the tokens of an expert are dealt to its places in turn.

        Args:
            index_M: The expert of each token.
            counts_E: Tokens of each expert.

        Returns:
            The place for each token, and how many tokens go to each place of all ranks.
        """
        if self._copies_E.device != index_M.device:
            self._copies_E, self._places_EC, self._given = (
                t.to(index_M.device) for t in (self._copies_E, self._places_EC, self._given)
            )
        expert_M, order_M = index_M.sort(stable=True)
        turn_M = torch.arange(len(index_M), device=index_M.device) - (counts_E.cumsum(0) - counts_E)[expert_M]
        turn_M += self._group.rank()  # so that odd tokens of all ranks do not go to the same place
        place_M = self._places_EC[expert_M, turn_M % self._copies_E[expert_M]]
        counts_P = torch.bincount(place_M, minlength=self._group.size() * self.places)
        return torch.empty_like(index_M).index_copy(0, order_M, place_M), counts_P

    @contextmanager
    def brought(self, module: nn.Module, attributes: tuple[str, ...]) -> Iterator[None]:
        """Inside, the module has the weights of all experts that this rank computes. Collective over `ep`.

        Args:
            module: The module.
            attributes: Its attributes that hold the number of experts.
        """
        present = module.__dict__
        entries: dict[str, Any] = dict.fromkeys(attributes, self.experts)
        for key in [k for k, parameter in module._parameters.items() if parameter is not None]:
            own = getattr(module, key)  # under `tp` its local tensor stands in `__dict__`
            given = exchange_rows(own.index_select(0, self._given), self._sent, self._received, self._group)
            entries[key] = torch.cat([own, given])
        before = {key: present[key] for key in entries if key in present}
        present.update(entries)  # where attributes are looked up before `_parameters`
        try:
            yield
        finally:
            for key in entries:
                del present[key]
            present.update(before)
