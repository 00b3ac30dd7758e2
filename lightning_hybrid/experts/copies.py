"""Copies of experts: several ranks compute a hot expert and share its tokens.

A copy exists for one forward and backward pass: the weights are sent from the rank that holds the expert, and the
gradients are sent back and added to those of the tokens computed there. Parameters, optimizers and checkpoints contain
one expert only.

Reference: He et al., FasterMoE, PPoPP 2022, section 4.2 (shadowed experts: weights are sent to the tokens), implemented
in `ExpertCopies.choose()` and `ExpertCopies.gathered_weights()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hybrid._torch_private import all_to_all_rows, own_parameters
from lightning_hybrid.spec.expert_plan import ExpertPlan


class ExpertCopies:
    """The places at which experts of one module are computed, and the weights of this rank's copies.

    All ranks have the same number of places: first those of the rank's experts in order, then those of copies. A place
    without an expert receives no tokens.

    Args:
        plan: How the module is divided.
        hosts: The experts that each rank computes.
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
        """Number of experts that this rank computes."""
        self.places = len(parts[rank]) + max(map(len, foreign))
        """Number of places of each rank."""
        copied = [[parts[rank].index(e) for e in of_rank if owner[e] == rank] for of_rank in foreign]
        self._sent = [len(rows) for rows in copied]
        self._received = [sum(owner[e] == r for e in foreign[rank]) for r in range(ranks)]
        self._copied = torch.tensor([row for rows in copied for row in rows], dtype=torch.long)
        places: list[list[int]] = [[] for _ in range(plan.experts)]
        for r, hosted in enumerate(hosts):
            slots = parts[r] + foreign[r]
            for expert in hosted:
                places[expert].append(r * self.places + slots.index(expert))
        self._copies_E = torch.tensor([len(p) for p in places])
        most = max(map(len, places))
        self._places_EC = torch.tensor([p + p[:1] * (most - len(p)) for p in places])

    def choose(self, index_M: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses a place for each token; the tokens of an expert are assigned round-robin to its places.

        Args:
            index_M: The expert of each token.
            counts_E: Tokens of each expert.

        Returns:
            The place of each token, and the number of tokens for each place of all ranks.
        """
        if self._copies_E.device != index_M.device:
            self._copies_E, self._places_EC, self._copied = (
                t.to(index_M.device) for t in (self._copies_E, self._places_EC, self._copied)
            )
        expert_M, order_M = index_M.sort(stable=True)
        turn_M = torch.arange(len(index_M), device=index_M.device) - (counts_E.cumsum(0) - counts_E)[expert_M]
        turn_M += self._group.rank()  # otherwise odd tokens of all ranks would go to the same place
        place_M = self._places_EC[expert_M, turn_M % self._copies_E[expert_M]]
        counts_P = torch.bincount(place_M, minlength=self._group.size() * self.places)
        return torch.empty_like(index_M).index_copy(0, order_M, place_M), counts_P

    @contextmanager
    def gathered_weights(self, module: nn.Module, attributes: tuple[str, ...]) -> Iterator[None]:
        """Gives `module` the weights of all experts that this rank computes. Collective over `ep`.

        Args:
            module: The module.
            attributes: Attributes of `module` with the number of experts.
        """
        present = module.__dict__
        entries: dict[str, Any] = dict.fromkeys(attributes, self.experts)
        for key in [k for k, parameter in own_parameters(module).items() if parameter is not None]:
            own = getattr(module, key)  # under `tp` the local tensor is in `__dict__`
            received = all_to_all_rows(own.index_select(0, self._copied), self._sent, self._received, self._group)
            entries[key] = torch.cat([own, received])
        before = {key: present[key] for key in entries if key in present}
        present.update(entries)  # attribute lookup reads `__dict__` before the registered parameters
        try:
            yield
        finally:
            for key in entries:
                del present[key]
            present.update(before)
