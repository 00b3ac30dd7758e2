"""DiLoCo: replicas make local steps, and every H steps synchronize by a step of an outer optimizer.

With x the weights at the last synchronization and x_r those of replica r after H local steps, the outer gradient is
x - mean_r x_r, used by an outer SGD with Nesterov momentum. Momentum 0 and learning rate 1 give the mean of the
replicas (local SGD).

Reference: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv:2311.08105,
algorithm 1, implemented in `DiLoCo.agree()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hybrid.collectives import to_local
from lightning_hybrid.replicas.reducer import ReplicaReducer
from lightning_hybrid.spec.gradient_sync import GradientSync


class DiLoCo:
    """Synchronizes replicas that make local steps.

    Args:
        parameters: This rank's trainable parameters, by name; equal on all replicas at construction.
        group: The ranks that hold the same parameters, one of each replica.
        sync: Local steps per synchronization, and options of the outer optimizer.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup, sync: GradientSync) -> None:
        self._parameters, self._every = dict(parameters), sync.every_n_steps
        self._anchors = {n: nn.Parameter(to_local(p.detach()).clone()) for n, p in parameters.items()}
        self._outer = torch.optim.SGD(
            self._anchors.values(),
            lr=sync.outer_learning_rate,
            momentum=sync.outer_momentum,
            nesterov=sync.outer_momentum > 0,
        )
        self._mean = ReplicaReducer(self._anchors.values(), group, group.size())
        self._steps = 0

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends per local step, on average."""
        return self._mean.sent_bytes / self._every

    def after_step(self) -> None:
        """Counts a local step; synchronizes after H of them. Collective over the group every H steps."""
        self._steps += 1
        if self._steps == self._every:
            self.agree()

    def agree(self) -> None:
        """Makes the outer step, unless there was no local step since the last one. Collective over the group."""
        if self._steps == 0:
            return
        self._steps = 0
        for name, anchor in self._anchors.items():
            anchor.grad = anchor.detach() - to_local(self._parameters[name].detach())
        self._mean.finish()
        self._outer.step()
        for name, anchor in self._anchors.items():
            anchor.grad = None
            to_local(self._parameters[name].detach()).copy_(anchor.detach())

    def agreed(self, name: str) -> Tensor | None:
        """Returns the weight at the last synchronization, laid out as the parameter; None if it is not trained."""
        if name not in self._anchors:
            return None
        weight = torch.empty_like(self._parameters[name]).detach()
        to_local(weight).copy_(self._anchors[name].detach())
        return weight

    def state_dict(self) -> dict[str, Any]:
        """Returns this replica's weights and step count, and the outer momentum."""
        outer = {n: self._outer.state[a]["momentum_buffer"] for n, a in self._anchors.items() if self._outer.state[a]}
        weights = {n: to_local(p.detach()) for n, p in self._parameters.items()}
        return {"steps": self._steps, "weights": weights, "outer": outer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores this replica's state. Call it after `begin()` with the weights of the last synchronization."""
        self._steps = state["steps"]
        with torch.no_grad():
            for name, weight in state["weights"].items():
                to_local(self._parameters[name].detach()).copy_(weight)
            for name, buffer in state["outer"].items():
                anchor = self._anchors[name]
                self._outer.state[anchor]["momentum_buffer"] = buffer.to(anchor.device)

    def begin(self) -> None:
        """Uses the present weights, equal on all replicas, as those of the last synchronization."""
        for name, anchor in self._anchors.items():
            anchor.detach().copy_(to_local(self._parameters[name].detach()))
