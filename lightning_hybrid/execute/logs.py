"""`self.log` under any layout: recorded during a step, reduced over microbatches and replicas, replayed on every rank.

A step's `self.log` calls run once a microbatch, and on one stage only. They are collected here, so that Lightning sees
each key once a step, on every rank, with the value that one process would have logged for the global batch.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from lightning_hybrid.partition.mesh import Mesh

_SIGNATURE = inspect.signature(LightningModule.log)
_SLOTS = 32
"""Values that fit in the first all-reduce; a step that logs more needs a second one."""


@dataclass
class LogEntry:
    """One key logged in a step."""

    name: str
    options: dict[str, Any]
    value: Any
    """Sum of value x weight for means, else the reduced value; for torchmetrics objects the object's module name."""
    weight: float
    """Samples behind the value."""
    reduction: str
    """`mean`, `sum`, `max`, `min` or `metric`."""


@dataclass
class LogRecorder:
    """Collects the `self.log` calls of one step."""

    root: pl.LightningModule
    entries: dict[str, LogEntry] = field(default_factory=dict)

    @contextmanager
    def recording(self, samples: int, owner: Any = None) -> Iterator[None]:
        """Inside, `self.log` records; `samples` weigh a value with no `batch_size`; calls count while `owner.own`."""

        def log(*args: Any, **kwargs: Any) -> None:
            if owner is None or owner.own:
                bound = _SIGNATURE.bind(self.root, *args, **kwargs)
                self._record(samples, **{k: v for k, v in bound.arguments.items() if k != "self"})

        before = self.root.__dict__.get("log")
        self.root.__dict__["log"] = log
        try:
            yield
        finally:
            if before is None:
                self.root.__dict__.pop("log", None)
            else:
                self.root.__dict__["log"] = before

    def _record(self, samples: int, name: str, value: Any, **options: Any) -> None:
        weight = float(options.pop("batch_size", None) or samples)
        if isinstance(value, Metric):
            path = next(n for n, m in self.root.named_modules() if m is value)
            self.entries[name] = LogEntry(name, options, path, weight, "metric")
            return
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        if value.numel() != 1:
            raise ValueError(
                f"`self.log({name!r}, value)` takes a single number. Got a tensor of shape {tuple(value.shape)}. "
                "Reduce it, for example with `.mean()`."
            )
        value = value.reshape(())
        reduction = _reduction(options.get("reduce_fx", "mean"))
        entry = self.entries.get(name)
        scaled = value * weight if reduction == "mean" else value
        if entry is None:
            self.entries[name] = LogEntry(name, options, scaled, weight, reduction)
            return
        entry.weight += weight
        if reduction in ("mean", "sum"):
            entry.value = entry.value + scaled
        else:
            entry.value = (torch.maximum if reduction == "max" else torch.minimum)(entry.value, scaled)


def _reduction(reduce_fx: Any) -> str:
    name = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")
    return {"amax": "max", "amin": "min"}.get(name, name) if name in ("sum", "max", "min", "amax", "amin") else "mean"


def reduce_over_replicas(entries: dict[str, LogEntry], mesh: Mesh, device: torch.device) -> None:
    """Makes each entry that of the global batch; collective over the replicas, which must have logged the same keys.

    Raises:
        ValueError: On every replica, if the keys differ.
    """
    if mesh.layout.replicas == 1:
        return
    group = mesh.replica_group
    items = [e for e in entries.values() if e.reduction != "metric"]
    code = float(zlib.crc32("\n".join(sorted(entries)).encode()) % 1_000_003)
    head = torch.zeros(2 + 2 * _SLOTS, dtype=torch.float64, device=device)
    head[:2] = torch.tensor([code, code * code], dtype=torch.float64)
    summed = [e for e in items if e.reduction in ("mean", "sum")]
    for i, entry in enumerate(summed[:_SLOTS]):
        head[2 + 2 * i] = entry.value
        head[3 + 2 * i] = entry.weight
    dist.all_reduce(head, group=group)
    n = mesh.layout.replicas
    _check_same_keys(entries, code, head, mesh)
    if len(summed) > _SLOTS:
        rest = torch.tensor([[float(e.value), e.weight] for e in summed[_SLOTS:]], dtype=torch.float64, device=device)
        dist.all_reduce(rest, group=group)
        for entry, (value, weight) in zip(summed[_SLOTS:], rest, strict=True):
            entry.value, entry.weight = value, float(weight)
    for i, entry in enumerate(summed[:_SLOTS]):
        entry.value, entry.weight = head[2 + 2 * i].clone(), float(head[3 + 2 * i])
    for entry in entries.values():
        if entry.reduction in ("max", "min"):
            entry.value = torch.as_tensor(entry.value, device=device).clone()
            largest = entry.reduction == "max"
            dist.all_reduce(entry.value, dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN, group=group)
        if entry.reduction in ("max", "min", "metric"):
            entry.weight *= n


def _check_same_keys(entries: dict[str, LogEntry], code: float, head: Tensor, mesh: Mesh) -> None:
    n = mesh.layout.replicas
    if head[0].item() == code * n and head[1].item() == code * code * n:
        return
    keys: list[Any] = [None] * n
    dist.all_gather_object(keys, sorted(entries), group=mesh.replica_group)
    raise ValueError(
        f"`self.log` must be called with the same keys on every replica in a step. Got {keys}. "
        "Log a key on all of them or on none."
    )


def share_over_stages(entries: dict[str, LogEntry], loss: Tensor | None, mesh: Mesh, device: torch.device) -> Tensor:
    """Gives every pipeline rank the entries of all stages and the loss of the last; collective over `pp`."""
    plain = [
        LogEntry(e.name, e.options, e.value if e.reduction == "metric" else float(e.value), e.weight, e.reduction)
        for e in entries.values()
    ]
    gathered: list[Any] = [None] * mesh.layout.pp
    dist.all_gather_object(gathered, (None if loss is None else float(loss.detach()), plain), group=mesh.group("pp"))
    shared_loss = 0.0
    for other_loss, others in gathered:
        shared_loss = shared_loss if other_loss is None else other_loss
        for entry in others:
            entries.setdefault(entry.name, entry)
    return torch.tensor(shared_loss, device=device)


def replay(root: pl.LightningModule, entries: dict[str, LogEntry]) -> None:
    """Logs every entry once, in the same order on every rank."""
    for name in sorted(entries):
        entry = entries[name]
        options = {k: v for k, v in entry.options.items() if k != "sync_dist"}
        if entry.reduction == "metric":
            value: Any = root.get_submodule(entry.value)
        else:
            value = torch.as_tensor(entry.value, dtype=torch.float64)
            value = (value / entry.weight if entry.reduction == "mean" else value).to(root.device, torch.float32)
        LightningModule.log(root, name, value, batch_size=max(1, round(entry.weight)), **options)
