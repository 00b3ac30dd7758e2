"""Reduces values over the replicas that hooks of the LightningModule and of callbacks log by `self.log`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningModule
from torchmetrics import Metric

from lightning_hybrid._lightning_private import fabric_of, of_package, running_hook, samples_of_running_batch
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.logs import LogRecorder, by_name, leave_out, replay
from lightning_hybrid.metrics.reduction import reduce_over_replicas
from lightning_hybrid.patching import patched


class HookLogs:
    """Handles `self.log` and `self.log_dict` outside the steps, in hooks of the module and of callbacks.

    Lightning requires every rank to call them. Values are reduced over the replicas, regardless of `sync_dist`.
    """

    def __init__(self, root: pl.LightningModule, mesh: Mesh, device: torch.device) -> None:
        self._root, self._mesh, self._device = root, mesh, device
        self._patches = ExitStack()
        self.padding: Callable[[], bool] = lambda: False
        """Returns True if this replica's samples of the running batch are padding."""

    def install(self) -> None:
        """Starts intercepting the calls of the LightningModule, if there are several replicas."""
        if self._mesh.layout.replicas > 1:
            self._patches.enter_context(patched(self._root, log=self._log, log_dict=self._log_dict))

    def remove(self) -> None:
        """Stops intercepting the calls."""
        self._patches.close()

    def _log(self, *args: Any, **kwargs: Any) -> None:
        self._log_all([by_name(self._root, args, kwargs)])

    def _log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        calls: list[dict[str, Any]] = []
        collector = _Collector(self._root, calls)
        of_package(self._root, LightningModule).log_dict(collector, dictionary, *args, **kwargs)  # type: ignore[arg-type]
        if "log" in self._root.__dict__ and self._root.__dict__["log"] != self._log:
            for call in calls:  # in a step, whose recorder collects them
                self._root.log(**call)
        else:
            self._log_all(calls)

    def _log_all(self, calls: list[dict[str, Any]]) -> None:
        recorder = LogRecorder(self._root)
        samples = samples_of_running_batch(self._root.trainer)
        weighed = {}
        for i, call in enumerate(calls):
            if isinstance(call["value"], Metric) or call.get("rank_zero_only", False):
                own_log = of_package(self._root, LightningModule).log
                own_log(self._root, **{k: v for k, v in call.items() if k != "sync_dist"})
                continue
            weighed[0, call["name"], i] = samples is not None or call.get("batch_size") is not None
            recorder.record(samples or 1, (0, call["name"], i), 0, **call)
        if not recorder.calls:
            return
        entries = recorder.reduced()
        if self.padding() and samples is not None:
            leave_out(entries)
        reduce_over_replicas(entries, self._mesh, self._device, running_hook(self._root) or "no hook")
        for key, entry in recorder.calls.items():
            if not weighed[key]:  # between batches each rank's value counts once, as in one process
                entry.value = entry.value / entry.weight if entry.reduction == "mean" else entry.value
                entry.weight = 1.0
        replay(self._root, entries)


@dataclass
class _Collector:
    """Collects, in place of a LightningModule, the `log` calls that its `log_dict` makes of a dictionary."""

    root: pl.LightningModule
    calls: list[dict[str, Any]]

    @property
    def _fabric(self) -> Any:
        return fabric_of(self.root)

    def log(self, **call: Any) -> None:
        self.calls.append(call)
