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
from lightning_hybrid._torch_private import user_location
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.logs import LogRecorder, by_name, leave_out, replay
from lightning_hybrid.metrics.reduction import reduce_over_replicas
from lightning_hybrid.patching import patched

STEP_BEFORE = {
    "on_train_epoch_end": "training_step",
    "on_validation_epoch_end": "validation_step",
    "on_test_epoch_end": "test_step",
}
"""Hooks that log what steps of an epoch have kept."""


class HookLogs:
    """Handles `self.log` and `self.log_dict` outside the steps, in hooks of the module and of callbacks.

    Lightning requires every rank to call them. Values are reduced over the replicas, regardless of `sync_dist`; at the
    end of an epoch by the number of samples of each replica, since that of the last batch may differ.
    """

    def __init__(self, root: pl.LightningModule, mesh: Mesh, device: torch.device) -> None:
        self._root, self._mesh, self._device = root, mesh, device
        self._patches = ExitStack()
        self.padding: Callable[[], bool] = lambda: False
        """Returns True if this replica's samples of the running batch are padding."""
        self.announce: Callable[[str], object] = lambda what: None
        """Called before a collective with what this replica does: the others may not do it."""
        self.samples_in: Callable[[str], float] = lambda step: 1.0
        """Returns the number of samples on which this replica has run a step in the present epoch, without padding."""
        self.differing: dict[str, set[str]] = {}
        """Names of logged values that differed between replicas, by hook, the same on all ranks."""

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
        samples, hook = samples_of_running_batch(self._root.trainer), running_hook(self._root) or "no hook"
        seen = self.samples_in(STEP_BEFORE[hook]) if hook in STEP_BEFORE else 1.0
        weighed = {}
        for i, call in enumerate(calls):
            if isinstance(call["value"], Metric) or call.get("rank_zero_only", False):
                own_log = of_package(self._root, LightningModule).log
                own_log(self._root, **{k: v for k, v in call.items() if k != "sync_dist"})
                continue
            weighed[0, call["name"], i] = samples is not None or call.get("batch_size") is not None
            recorder.record(samples or seen, (0, call["name"], i), 0, **call)
        if not recorder.calls:
            return
        entries = recorder.reduced()
        if self.padding() and samples is not None:
            leave_out(entries)
        self.announce(f"logs {', '.join(f'`{e.name}`' for e in entries)} in `{hook}` ({user_location()})")
        self.differing.setdefault(hook, set()).update(reduce_over_replicas(entries, self._mesh, self._device, hook))
        for key, entry in recorder.calls.items():
            if not weighed[key]:  # between batches a value counts once, as in one process
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
