"""What the stages of a pipeline tell each other after a step: what they logged, and the loss of the last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.collectives import share_object
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.logs import LogEntry
from lightning_hybrid.metrics.torchmetrics import Metrics


@dataclass
class _Content:
    """What a rank has to tell in a step, values apart."""

    entries: list[tuple[str, dict[str, Any], str, tuple[int, int], Any]]
    """Name, options, reduction, place and, for torchmetrics objects, the module name, of each logged value."""
    metrics: tuple[tuple[str, bool], ...]
    """See `Metrics.updated`."""
    extras: bool
    """Whether `training_step` returned more than the loss."""


@dataclass
class _Agreement:
    own: _Content
    all: list[_Content]
    first: int
    """Where this rank's values stand in the common buffer."""
    size: int


class StageLogs:
    """Shares a step's logged values over the stages.

    From one step to the next only the values change, as a rule, so they travel as one small all-reduce. A rank with
    something else to tell than last time says so in it; then all tell each other what they have, as objects.
    """

    def __init__(self, mesh: Mesh, device: torch.device, metrics: Metrics) -> None:
        self._mesh, self._device, self._metrics = mesh, device, metrics
        self._agreed: dict[str, _Agreement] = {}
        self.objects_sent = 0
        """How often ranks had to tell each other what they have."""

    def share(
        self, step: str, entries: list[LogEntry], loss: Tensor | None = None, extras: dict[str, Any] | None = None
    ) -> tuple[Tensor, list[LogEntry], dict[str, Any]]:
        """Gives every pipeline rank the entries of all stages, the loss and what came with it; collective over `pp`.

        Args:
            step: Name of the step function.
            entries: What this rank has logged.
            loss: The loss, on the rank of the last stage.
            extras: What `training_step` returned beside it, there.

        Returns:
            The same three, for the whole pipeline.
        """
        own = _Content(
            [(e.name, e.options, e.reduction, e.place, e.value if e.reduction == "metric" else None) for e in entries],
            self._metrics.updated,
            bool(extras),
        )
        agreed = self._agreed.get(step)
        changed = agreed is None or agreed.own != own
        values = self._exchange(agreed, changed, entries, loss)
        if changed or values[0] > 0:
            agreed = self._agreed[step] = self._agree(own)
            values = self._exchange(agreed, False, entries, loss)
        return self._take(agreed, values, extras)  # type: ignore[arg-type]

    def _exchange(
        self, agreed: _Agreement | None, changed: bool, entries: list[LogEntry], loss: Tensor | None
    ) -> list[float]:
        """[Ranks with other content than agreed, the loss, value and weight of every entry of every rank]."""
        size = 0 if agreed is None else agreed.size
        own = [0.0] * (2 + 2 * size)
        own[0] = float(changed)
        if loss is not None:
            own[1] = float(loss.detach())
        if agreed is not None and not changed:
            for i, entry in enumerate(entries, start=1 + agreed.first):
                own[2 * i] = 0.0 if entry.reduction == "metric" else float(entry.value)
                own[2 * i + 1] = entry.weight
        buffer = torch.tensor(own, dtype=torch.float64, device=self._device)
        dist.all_reduce(buffer, group=self._mesh.log_stage_group)
        return buffer.tolist()

    def _agree(self, own: _Content) -> _Agreement:
        self.objects_sent += 1
        gathered: list[Any] = [None] * self._mesh.layout.pp
        dist.all_gather_object(gathered, own, group=self._mesh.log_stage_group)
        sizes = [len(content.entries) for content in gathered]
        return _Agreement(own, gathered, sum(sizes[: self._mesh.rank("pp")]), sum(sizes))

    def _take(
        self, agreed: _Agreement, values: list[float], extras: dict[str, Any] | None
    ) -> tuple[Tensor, list[LogEntry], dict[str, Any]]:
        entries, i = [], 1
        for rank, content in enumerate(agreed.all):
            self._metrics.updated_elsewhere(rank, content.metrics)
            for name, options, reduction, place, metric in content.entries:
                value = metric if reduction == "metric" else values[2 * i]
                entries.append(LogEntry(name, options, value, values[2 * i + 1], reduction, place))
                i += 1
        loss = torch.tensor(values[1], device=self._device)
        return loss, sorted(entries, key=lambda e: e.place), self._shared_extras(agreed, extras)

    def _shared_extras(self, agreed: _Agreement, extras: dict[str, Any] | None) -> dict[str, Any]:
        for rank, content in enumerate(agreed.all):
            if content.extras:
                return share_object(extras, rank, self._mesh.log_stage_group, self._device)
        return {}
