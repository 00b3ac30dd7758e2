"""Reduces the logs of a step: as numbers that are summed over all ranks, together with other numbers of the step.

From one step to the next usually only values change. Therefore every rank keeps a table of the logs of all ranks in
earlier steps. In a step each rank sends the number of the row that matches its logs, and the square of the number: the
sums over the ranks show every rank whether the ranks of each stage name the same row. If the ranks of a stage differ,
or a rank has logged something new, all ranks gather their logs as objects, add a row, and sum their numbers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._lightning_private import as_hook, is_overridden
from lightning_hybrid._torch_private import location_of
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.logs import LogEntry, replay
from lightning_hybrid.metrics.reduction import as_numbers, different_keys, pack, unpack
from lightning_hybrid.metrics.torchmetrics import Metrics

_ROWS = 16
"""Number of rows at which a table is cleared: a module may log keys that never repeat. Empirical."""


_HOOKS_BEFORE_CHECK = ("on_before_zero_grad", "on_before_backward", "on_after_backward")
"""Hooks of callbacks and of the LightningModule between `training_step` and the check of its gradients."""


class _Content(NamedTuple):
    """The logs of a rank in a step, without values."""

    entries: list[LogEntry]
    metrics: tuple[tuple[str, bool], ...]
    """The metrics that the rank has updated, as in `Metrics.updated`."""

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Names and reductions, which must be the same on every replica."""
        entries = [e for e in self.entries if e.everywhere]
        return [(f"{e.name} (by the `weight` of the loss)" if e.weighted else e.name, e.reduction) for e in entries]


def seen_before_step(trainer: pl.Trainer) -> bool:
    """Returns True if user code between `training_step` and the check of its gradients may read the logs."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    return any(is_overridden(hook, owner) for hook in _HOOKS_BEFORE_CHECK for owner in callbacks) or any(
        is_overridden(hook, trainer.lightning_module)
        for hook in (*_HOOKS_BEFORE_CHECK, "backward", "optimizer_step", "optimizer_zero_grad")
    )


@dataclass
class _Table:
    """The logs of all ranks in earlier steps of one step function."""

    sizes: list[tuple[int, int]]
    """By pipeline rank: number of slots for weights and for values, enough for every row."""
    rows: list[list[_Content]] = field(default_factory=list)
    """Rows of contents by pipeline rank, for the pipeline of this rank."""


class StepLogs:
    """Reduces the logs of a step over replicas, sends them to all stages, and replays them on every rank.

    Args:
        root: The LightningModule.
        mesh: The mesh.
        device: This rank's device.
        metrics: The torchmetrics objects of the module.
    """

    def __init__(self, root: pl.LightningModule, mesh: Mesh, device: torch.device, metrics: Metrics) -> None:
        self._root, self._mesh, self._device, self._metrics = root, mesh, device, metrics
        self._tables: dict[str, _Table] = {}
        self._step, self._entries = "", list[LogEntry]()
        self.pending = False
        """True if logs wait to be summed and replayed."""
        self.gathered = 0
        """Number of times that the ranks have gathered their logs as objects."""

    def take(self, step: str, entries: list[LogEntry]) -> None:
        """Stores this rank's `entries` of `step`; replays them at once if no rank needs those of another."""
        self._step, self._entries = step, entries
        if self._mesh.layout.replicas == self._mesh.layout.pp == 1:
            self._replay(entries)
        else:
            self.pending = True

    def numbers(self) -> list[Tensor]:
        """Returns the numbers to sum over all ranks: float64, equally many on every rank; none if no logs wait."""
        if not self.pending:
            return []
        stage, replica, replicas = self._mesh.rank("pp"), self._mesh.replica, self._mesh.layout.replicas
        row = float(self._own_row())
        found: list[Tensor] = []
        for rank, (weights_size, values_size) in enumerate(self._table.sizes):
            mine, weights, values = rank == stage, list[float](), []
            if mine and row and self._mesh.rank("tp") == 0:  # all ranks of `tp` have logged the same
                weights, values = pack(self._sent_entries, replica, replicas)
            names = [row, row * row] if mine else []
            found.append(as_numbers(names, self._device, 2))
            found.append(as_numbers(weights, self._device, weights_size))
            found.append(as_numbers(values, self._device, values_size))
        return found

    def take_sums(self, sums: Tensor, on_host: Sequence[float]) -> None:
        """Replays the pending logs. Collective over all ranks if the ranks of a stage name no common row.

        Args:
            sums: The sums of `numbers` over all ranks, on the device.
            on_host: The same sums on the host.

        Raises:
            ValueError: On all ranks, if replicas have logged different keys.
        """
        row = self._named_row(on_host)
        if row is None:
            self._add_row()
            sums = torch.cat(self.numbers())
            dist.all_reduce(sums)
            on_host = sums.tolist()
            row = self._table.rows[-1]
        self.pending = False
        entries = [] if self._mesh.layout.pp > 1 else [e for e in self._entries if not e.everywhere]
        at = 0
        for rank, (content, (weights, values)) in enumerate(zip(row, self._table.sizes, strict=True)):
            of_rank = self._sent_entries if rank == self._mesh.rank("pp") else [replace(e) for e in content.entries]
            first, second = at + 2, at + 2 + weights
            at = second + values
            of_all = (on_host[first:second], sums[second:at])
            unpack(of_rank, *of_all, self._mesh.replica, self._mesh.layout.replicas)
            entries += of_rank
            if self._mesh.layout.pp > 1:
                self._metrics.updated_elsewhere(rank, content.metrics)
        self._replay(sorted(entries, key=lambda e: e.place))

    def _replay(self, entries: list[LogEntry]) -> None:
        with as_hook(self._root, self._step):
            replay(self._root, entries, self._metrics.prepare)

    @property
    def _sent_entries(self) -> list[LogEntry]:
        """This rank's entries that other ranks need; those with `rank_zero_only` are for the stages of the pipeline."""
        return [e for e in self._entries if e.everywhere or self._mesh.layout.pp > 1]

    # ---- the table

    @property
    def _table(self) -> _Table:
        return self._tables.setdefault(self._step, _Table([(0, 0)] * self._mesh.layout.pp))

    def _content(self) -> _Content:
        shared = self._mesh.layout.pp > 1  # without stages, options stay on their rank and may differ
        entries = [
            replace(e, value=e.value if e.reduction == "metric" else None, weight=0.0, samples=0.0, values=[])
            if shared
            else LogEntry(e.name, {}, None, 0.0, e.reduction, weighted=e.weighted)
            for e in self._sent_entries
        ]
        return _Content(entries, self._metrics.updated if shared else ())

    def _own_row(self) -> int:
        """Returns the number, from 1, of the last row that matches this rank's logs; 0 if none does."""
        own, stage, rows = self._content(), self._mesh.rank("pp"), self._table.rows
        return next((i for i in range(len(rows), 0, -1) if rows[i - 1][stage] == own), 0)

    def _named_row(self, on_host: Sequence[float]) -> list[_Content] | None:
        """Returns the contents by pipeline rank; None if the ranks of a stage name no common row."""
        found, at = [], 0
        ranks = self._mesh.layout.devices // self._mesh.layout.pp
        for stage, sizes in enumerate(self._table.sizes):
            total, squares = int(on_host[at]), int(on_host[at + 1])
            if total == 0 or ranks * squares != total * total:  # equal only if all numbers are (Cauchy-Schwarz)
                return None
            found.append(self._table.rows[total // ranks - 1][stage])
            at += 2 + sum(sizes)
        return found

    def _add_row(self) -> None:
        self.gathered += 1
        layout, table = self._mesh.layout, self._table
        gathered: list[_Content] = gather_objects(self._content())
        by_place = list(zip(self._mesh.places, gathered, strict=True))
        if len(table.rows) == _ROWS:
            table.rows, table.sizes = [], [(0, 0)] * layout.pp
        row = []
        for stage, size in enumerate(table.sizes):
            of_stage = [(place, content) for place, content in by_place if place.pp == stage]
            by_replica = sorted(of_stage, key=lambda of: (of[0].tp, of[0].replica(layout)))
            if any(content.keys != by_replica[0][1].keys for _, content in by_replica):
                keys = [[name for name, _ in content.keys] for _, content in by_replica]
                raise different_keys(keys, location_of(getattr(self._root, self._step)), layout)
            own = (self._mesh.place.tp, self._mesh.replica)
            row.append(next(c for place, c in by_replica if (place.tp, place.replica(layout)) == own))
            needed = [tuple(map(len, pack(c.entries, 0, layout.replicas))) for _, c in by_replica]
            table.sizes[stage] = tuple(map(max, zip(size, *needed, strict=True)))  # type: ignore[assignment]
        table.rows.append(row)
