"""Records `self.log` calls of a step, reduces them over microbatches and replicas, and replays them on every rank.

A step's `self.log` calls run once per microbatch, and on one stage only. The calls are collected here, so that
Lightning sees each call once per step, on every rank, with the value that one process would have logged for the global
batch. Calls in other hooks already run on every rank; their values are reduced over the replicas.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from lightning_hybrid._lightning_private import of_package
from lightning_hybrid.collectives import to_full

_SIGNATURE = inspect.signature(LightningModule.log)
_OPTIONS = frozenset(_SIGNATURE.parameters) - {"self", "name", "value"}
_NOT_REPLAYED = ("sync_dist", "sync_dist_group", "enable_graph")
"""Options without effect once a value is recorded."""


_NO_WEIGHT = 1e-30
"""Weight per sample of a value with weight or `batch_size` 0: it counts only where no other has any. Empirical."""


class LoggedValue(NamedTuple):
    """The value of one microbatch."""

    value: Tensor
    microbatch: int
    samples: float
    """Number of samples of the microbatch, or the `batch_size` that was logged with the value."""
    weighted: bool
    """True if the value was logged without `batch_size`: the weight of the loss counts, if there is one."""


@dataclass
class LogEntry:
    """One `self.log` call of a step."""

    name: str
    options: dict[str, Any]
    value: Any
    """Sum of value x weight for means, otherwise the reduced value; for a torchmetrics object its module name."""
    weight: float
    """The loss's weight if the step returns one, else as `samples`."""
    reduction: str
    """`mean`, `sum`, `max`, `min` or `metric`."""
    place: tuple[int, int] = (0, 0)
    """Stage, and position among the stage's calls: sorts entries as one process would have logged them."""
    weighted: bool = False
    """True if `weight` is the loss's weight."""
    samples: float = 0.0
    """Number of samples of the value, or the `batch_size` that was logged with it."""
    values: list[LoggedValue] = field(default_factory=list, compare=False, repr=False)
    """The values of the microbatches, until they are reduced."""

    @property
    def everywhere(self) -> bool:
        """True if every replica logs the entry, that is, without `rank_zero_only`."""
        return not self.options.get("rank_zero_only", False)

    def reduce(self, loss_weights: Sequence[float] | None) -> None:
        """Reduces the values of the microbatches.

        Args:
            loss_weights: Weight of the loss, by microbatch; None: values are weighted by samples.
        """
        self.weight = self.samples = sum(v.samples for v in self.values)
        values = [v.value for v in self.values]
        if self.reduction == "mean":
            self.weighted = loss_weights is not None and any(v.weighted for v in self.values)
            weights = [_weight(v, loss_weights) for v in self.values]
            self.weight = sum(weights)
            values = [v * w for v, w in zip(values, weights, strict=True) if w]
        if self.reduction in ("mean", "sum"):
            self.value = sum(values[1:], values[0]) if values else torch.zeros((), dtype=torch.float64)
        elif self.reduction in ("max", "min"):
            together = torch.stack(values)
            self.value = together.amax() if self.reduction == "max" else together.amin()


def _weight(value: LoggedValue, loss_weights: Sequence[float] | None) -> float:
    weight = value.samples if loss_weights is None or not value.weighted else loss_weights[value.microbatch]
    if weight == 0.0 and bool(torch.isfinite(value.value)):  # a mean over no token may be NaN
        return (value.samples or 1.0) * _NO_WEIGHT
    return weight


def by_name(root: pl.LightningModule, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a `self.log` call, by name."""
    if len(args) == 2 and _OPTIONS.issuperset(kwargs):  # nearly all calls; most of their time would go into binding
        return {"name": args[0], "value": args[1], **kwargs}
    bound = _SIGNATURE.bind(root, *args, **kwargs)
    return {k: v for k, v in bound.arguments.items() if k != "self"}


LogCalls = dict[tuple[int, str, int], LogEntry]
"""Entries by stage, key, and number of earlier calls of this microbatch with the key."""


@dataclass
class LogRecorder:
    """Collects the `self.log` calls of one step."""

    root: pl.LightningModule
    calls: LogCalls = field(default_factory=dict)

    def reduced(self, loss_weights: Sequence[float] | None = None) -> list[LogEntry]:
        """Returns the logged entries, in order, reduced over the microbatches.

        Args:
            loss_weights: Weight of the loss, by microbatch; None: values are weighted by samples.
        """
        for entry in self.calls.values():
            entry.reduce(loss_weights)
        return sorted(self.calls.values(), key=lambda e: e.place)

    def add(self, calls: LogCalls, first: int) -> None:
        """Adds calls that were recorded elsewhere, in microbatches that are numbered from `first` on here."""
        for key, entry in calls.items():
            values = [value._replace(microbatch=value.microbatch + first) for value in entry.values]
            self.calls.setdefault(key, replace(entry, values=[])).values.extend(values)

    @contextmanager
    def recording(self, samples: float, owner: Any = None, stage: int = 0, microbatch: int = 0) -> Iterator[None]:
        """Records `self.log` calls of one microbatch for the duration of the context.

        Args:
            samples: Weight of a value that is logged without `batch_size`.
            owner: Calls are recorded only while `owner.own` is True, within `owner.paused()`; None: always.
            stage: Stage of the calls.
            microbatch: Index of the microbatch.
        """
        seen: Counter[str] = Counter()

        def log(*args: Any, **kwargs: Any) -> None:
            if owner is None or owner.own:
                with nullcontext() if owner is None else owner.paused():
                    options = by_name(self.root, args, kwargs)
                    self.record(samples, (stage, options["name"], seen[options["name"]]), microbatch, **options)
                seen[options["name"]] += 1

        before = self.root.__dict__.get("log")
        self.root.__dict__["log"] = log
        try:
            yield
        finally:
            if before is None:
                self.root.__dict__.pop("log", None)
            else:
                self.root.__dict__["log"] = before

    def record(
        self, samples: float, call: tuple[int, str, int], microbatch: int, /, name: str, value: Any, **options: Any
    ) -> None:
        """Records one `self.log` call of one microbatch."""
        given = options.pop("batch_size", None)
        weight = float(samples if given is None else given)
        options = {k: v for k, v in options.items() if k not in _NOT_REPLAYED}
        entry = self.calls.get(call)
        place = (call[0], len(self.calls))
        if isinstance(value, Metric):
            if entry is None:
                path = next(n for n, m in self.root.named_modules() if m is value)
                entry = self.calls[call] = LogEntry(name, options, path, 0.0, "metric", place)
            entry.values.append(LoggedValue(torch.zeros(()), microbatch, weight, False))
            return
        if not isinstance(value, numbers.Number | Tensor):
            own_log = of_package(self.root, LightningModule).log
            own_log(self.root, name, value, **options)  # raises Lightning's own error
        if isinstance(value, Tensor):
            value = to_full(value)  # such as the norm of a gradient, computed by the user
        # not by the `dtype` of `as_tensor`, which does not see that a value of an earlier stage has arrived
        value = torch.as_tensor(value).detach().to(torch.float64)
        if value.numel() != 1:
            raise ValueError(
                f"`self.log({name}, {value})` was called, but the tensor must have a single element. Got shape "
                f"{tuple(value.shape)}. Reduce it, for example with `.mean()`."
            )
        value = value.reshape(())
        if entry is None:
            reduction = _reduction(name, options.get("reduce_fx", "mean"))
            entry = self.calls[call] = LogEntry(name, options, None, 0.0, reduction, place)
        entry.values.append(LoggedValue(value, microbatch, weight, given is None))


_REDUCTIONS = {torch.mean: "mean", torch.sum: "sum", sum: "sum", torch.max: "max", max: "max"}
_REDUCTIONS |= {torch.min: "min", min: "min", "avg": "mean"} | {n: n for n in ("mean", "sum", "max", "min")}


def _reduction(name: str, reduce_fx: Any) -> str:
    """Returns the name of the reduction `reduce_fx`, by Lightning's rules."""
    found = _REDUCTIONS.get(reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx)
    if found is None:
        raise ValueError(
            f"`self.log({name!r}, reduce_fx=...)` takes only min, max, mean and sum, as Lightning does. Got "
            f"{reduce_fx}. Log a `torchmetrics.Metric` for another reduction."
        )
    return found


def leave_out(entries: list[LogEntry]) -> None:
    """Makes `entries` neutral in reductions: their samples are padding, the other replicas have the global batch."""
    empty = {"mean": 0.0, "sum": 0.0, "max": -math.inf, "min": math.inf}
    for entry in entries:
        entry.weight = entry.samples = 0.0
        if entry.reduction != "metric":
            entry.value = torch.tensor(empty[entry.reduction], dtype=torch.float64)


# ---- on every rank


def replay(
    root: pl.LightningModule, entries: list[LogEntry], prepare_metric: Callable[[LogEntry], None] | None = None
) -> None:
    """Logs every entry once, in the same order on every rank.

    Args:
        root: The LightningModule.
        entries: The entries to log.
        prepare_metric: Called with the entry of a torchmetrics object before it is logged.
    """
    for entry in entries:
        if entry.reduction == "metric":
            if prepare_metric is not None:
                prepare_metric(entry)
            value: Any = root.get_submodule(entry.value)
        else:
            value = torch.as_tensor(entry.value, dtype=torch.float64)
            value = (value / entry.weight if entry.reduction == "mean" else value).to(root.device, torch.float32)
        own_log = of_package(root, LightningModule).log
        samples = round(entry.samples if entry.weighted else entry.weight)  # as in one process, also over an epoch
        own_log(root, entry.name, value, batch_size=samples, **entry.options)


@contextmanager
def silent(root: pl.LightningModule) -> Iterator[None]:
    """Disables `self.log` for the duration of the context, in which modules run on random values."""
    kept = {key: root.__dict__[key] for key in ("log", "log_dict") if key in root.__dict__}
    root.__dict__.update(log=_nothing, log_dict=_nothing)
    try:
        yield
    finally:
        for key in ("log", "log_dict"):
            root.__dict__.pop(key)
        root.__dict__.update(kept)


def _nothing(*_: Any, **__: Any) -> None:
    return None
