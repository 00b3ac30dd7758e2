"""Synchronizes torchmetrics objects under any layout: over replicas, and from the stage that updates each metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

from lightning_hybrid._lightning_private import (
    concatenates,
    counts_as_updated,
    default_state,
    drop_result,
    metric_reductions,
    route_metric_sync,
    set_step_value,
)
from lightning_hybrid._torch_private import user_location
from lightning_hybrid.collectives import share_object, to_device, to_host
from lightning_hybrid.ghosts.preserve import preserved_module_state
from lightning_hybrid.ghosts.units import CallInterceptor
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.logs import LogEntry
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout


class Metrics:
    """Synchronizes the torchmetrics objects of a partitioned module.

    In a step, a metric is updated by the stage that has its input, with every replica's own samples. `compute` returns
    the value for all samples, on every rank: states are gathered over the replicas, and read from the stage that has
    them. A metric outside the module (for example of a callback) is updated on every rank separately, and only gathered
    over the replicas.
    """

    def __init__(self, root: pl.LightningModule, mesh: Mesh, device: torch.device) -> None:
        self._root, self._mesh, self._device = root, mesh, device
        self._names = {id(m): name for name, m in root.named_modules() if isinstance(m, Metric)}
        self._owners: dict[int, int] = {}
        """The pipeline rank that updates a metric in its steps, by the `id` of the metric."""
        self._copies: dict[str, Metric] = {}
        """For each metric that is called in steps, by name: a copy with the samples of one step."""
        self._updates: Counter[str] = Counter()
        self._called: set[str] = set()
        self._inside = False
        self.padding: Callable[[], bool] = lambda: False
        """Returns True if this replica's samples of the running step are padding."""
        self.factor: Callable[[], float] = lambda: 1.0
        """Returns the factor on a mean over this replica's batch, in the mean over replicas."""
        self.in_step: Callable[[], bool] = lambda: False
        """Returns True while a step of the user runs."""
        self.announce: Callable[[str], object] = lambda what: None
        """Called before a collective with what this replica does: the others may not do it."""
        self._undo: Callable[[], None] | None = None

    def install(self) -> None:
        """Starts to synchronize all metrics of this process according to the layout."""
        if self._undo is None:
            self._undo = route_metric_sync(self._synchronize)

    def remove(self) -> None:
        """Restores the original synchronization of metrics."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    # ---- in a step

    def begin_step(self) -> None:
        """Clears the records of the last step."""
        self._updates.clear()
        self._called.clear()

    def watching(self, interceptor: CallInterceptor) -> AbstractContextManager:
        """Returns a context in which calls of metrics are recorded, for steps without stages."""
        watched = self._names and self._mesh.layout.replicas > 1
        return interceptor.handled_by(_WithoutStages(self)) if watched else nullcontext()

    def call(self, metric: Any, kind: Literal["forward", "update"], call: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs `metric(...)` or `metric.update(...)` on this rank's samples."""
        if self._inside:
            return call(*args, **kwargs)
        for part in metric.modules():
            if id(part) in self._names:
                self._updates[self._names[id(part)]] += 1
        if self.padding():
            return self._call_for_result(metric, kind, call, args, kwargs)
        if not isinstance(metric, Metric):
            return call(*args, **kwargs)  # a collection calls its metrics one by one
        if type(metric) is MeanMetric and len(args) == 1 and not kwargs and torch.as_tensor(args[0]).ndim == 0:
            args = (*args, self.factor())  # the mean over a batch of which replicas have different numbers of samples
        with self._within():
            if kind == "forward" and id(metric) in self._names:
                self._copy_for_step(self._names[id(metric)], metric).update(*args, **kwargs)
            return call(*args, **kwargs)

    def _call_for_result(self, metric: Any, kind: str, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs the call for its result only: restores the states, and counts the updates of the other replicas."""
        with preserved_module_state(metric), self._within():
            out = call(*args, **kwargs)
        for part in metric.modules():
            if isinstance(part, Metric):
                counts_as_updated(part)
                if kind == "forward" and id(part) in self._names:
                    counts_as_updated(self._copy_for_step(self._names[id(part)], part))
        return out

    @contextmanager
    def _within(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _copy_for_step(self, name: str, metric: Metric) -> Metric:
        if name not in self._copies:
            self._copies[name] = deepcopy(metric)
        if name not in self._called:
            self._called.add(name)
            self._copies[name].reset()
        return self._copies[name]

    @property
    def updated(self) -> tuple[tuple[str, bool], ...]:
        """The names of the metrics that this rank has updated in the step, each with True if called (`metric(...)`)."""
        return tuple((name, name in self._called) for name in self._updates)

    def updated_elsewhere(self, rank: int, updated: tuple[tuple[str, bool], ...]) -> None:
        """Records the metrics that the stages of pipeline rank `rank` have updated in the step.

        Raises:
            PartitionError: If another rank also updates one of the metrics.
        """
        own = self._mesh.rank("pp")
        for name, called in updated:
            metric: Any = self._root.get_submodule(name)
            if self._owners.setdefault(id(metric), rank) != rank:
                raise PartitionError(
                    f"`layout='{self._mesh.layout}'`: the metric `{name}` is updated on stages of the pipeline ranks "
                    f"{self._owners[id(metric)]} and {rank}, and its state must be one rank's. Use one metric for "
                    "each place in the model, or a layout without `pp`."
                )
            if rank != own:
                counts_as_updated(metric)
                if called:
                    self._copy_for_step(name, metric)

    def prepare(self, entry: LogEntry) -> None:
        """Sets the step value of a metric that the step called to that of the whole batch, before `entry` is logged."""
        on_step = entry.options.get("on_step")
        wanted = self._root.trainer.training if on_step is None else on_step
        if not wanted or entry.value not in self._called:
            return
        metric: Any = self._root.get_submodule(entry.value)
        copy: Any = self._copies[entry.value]
        for part, original in zip(copy.modules(), metric.modules(), strict=True):
            if id(original) in self._owners and isinstance(part, Metric):
                self._owners[id(part)] = self._owners[id(original)]
                if self._owners[id(part)] != self._mesh.rank("pp"):
                    counts_as_updated(part)
        set_step_value(metric, copy.compute())

    # ---- when the layout changes

    def unmovable(self, layout: Layout) -> str | None:
        """Returns the name of an updated metric whose states cannot be moved to the replicas of `layout`, or None."""
        if max(layout.replicas, self._mesh.layout.replicas) == 1:
            return None
        for name in self._names.values():
            metric: Any = self._root.get_submodule(name)
            if metric.update_called and not all(_divides(r) for r in metric_reductions(metric).values()):
                return name
        return None

    def states_of_all(self) -> dict[str, dict[str, Any]]:
        """Returns, for each metric that has been updated, the states for the samples of all replicas. Collective."""
        found: dict[str, dict[str, Any]] = {}
        for name in self._names.values():
            metric: Any = self._root.get_submodule(name)
            if metric.update_called:
                own = {state: getattr(metric, state) for state in metric_reductions(metric)}
                self._synchronize(metric)
                found[name] = {state: getattr(metric, state) for state in own}
                for state, value in own.items():
                    setattr(metric, state, value)
        return found

    def load_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Loads global metric states: replica 0 gets all of them, the others only means, and reset the rest."""
        for name, values in states.items():
            metric: Any = self._root.get_submodule(name)
            for state, reduction in metric_reductions(metric).items():
                begins = self._mesh.replica > 0 and not _is_mean(reduction)
                setattr(metric, state, deepcopy(default_state(metric, state)) if begins else values[state])
            drop_result(metric)

    # ---- in `compute`

    def _synchronize(self, metric: Metric) -> None:
        """Replaces the states of `metric` by those for all samples. Collective."""
        reductions = metric_reductions(metric)
        states = {name: getattr(metric, name) for name in reductions}
        owner, layout = self._owners.get(id(metric)), self._mesh.layout
        if layout.replicas > 1 and self.in_step() and torch.is_grad_enabled():
            _check_no_gradient(metric, states)
        if layout.pp > 1 and owner is not None and not self._inside:  # inside a step only the owner runs this
            states = share_object(states, owner, self._mesh.log_stage_group, metric.device)
        if layout.replicas > 1:
            name = self._names.get(id(metric))
            self.announce(f"computes the value of {f'a {type(metric).__name__}' if name is None else f'`{name}`'}")
            gathered: list[Any] = [None] * layout.replicas
            dist.all_gather_object(gathered, to_host(states), group=self._mesh.log_group)
            by_replica = to_device(gathered, metric.device)
            states = {n: combine([s[n] for s in by_replica], reduction) for n, reduction in reductions.items()}
        for name, value in states.items():
            setattr(metric, name, value)


def _check_no_gradient(metric: Metric, states: Mapping[str, Any]) -> None:
    """Checks that no loss is computed from states that are gathered over the replicas.

    Raises:
        PartitionError: If a state has a gradient.
    """
    tensors = [t for value in states.values() for t in (value if isinstance(value, list) else [value])]
    if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise PartitionError(
            f"{user_location()} computes a value with a gradient from the metric {type(metric).__name__}, whose "
            "states are gathered over the replicas in this step (`dist_sync_on_step=True`), and the gradient would "
            "be lost. Leave out `dist_sync_on_step`: a loss is computed for the samples of each replica, and averaged. "
            "Or use a layout without `dp` and `fsdp`."
        )


def _is_mean(reduction: Callable[[Any], Any] | None) -> bool:
    return reduction is dim_zero_mean


def _divides(reduction: Callable[[Any], Any] | None) -> bool:
    """Returns True if the states that `load_states` sets on the replicas reduce to the global states."""
    known = (dim_zero_sum, dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_mean)
    return reduction in known or concatenates(reduction)


def combine(states: list[Any], reduction: Callable[[Any], Any] | None) -> Any:
    """Returns one state of a metric for all replicas, reduced as torchmetrics does.

    States are concatenated in the order of the samples: of n replicas, replica r has every n-th sample from r on.

    Args:
        states: The state on each replica: a tensor, or a list with one item per update.
        reduction: The metric's reduction of this state.
    """
    if not isinstance(states[0], list):
        if concatenates(reduction):
            return _joined(states)
        stacked = torch.stack(states)
        return stacked if reduction is None else reduction(stacked)
    if concatenates(reduction):
        joined = [torch.cat([t if t.ndim else t[None] for t in s]) for s in states if s]
        return _joined(joined) if joined else []
    parts = [len(s) for s in states]
    if not _alternating(parts):
        return [item for state in states for item in state]
    return [states[i % len(states)][i // len(states)] for i in range(sum(parts))]


def _joined(tensors: list[Tensor]) -> Tensor:
    if not _alternating([len(t) for t in tensors]):
        return torch.cat(tensors)
    out = torch.empty((sum(len(t) for t in tensors), *tensors[0].shape[1:]), dtype=tensors[0].dtype)
    out = out.to(tensors[0].device)
    for r, tensor in enumerate(tensors):
        out[r :: len(tensors)] = tensor
    return out


def _alternating(lengths: list[int]) -> bool:
    """Returns True if `lengths` are those of round-robin sharding from replica 0."""
    total, n = sum(lengths), len(lengths)
    return all(length == (total - r + n - 1) // n for r, length in enumerate(lengths))


class _WithoutStages:
    """Records the calls of metrics; units run unchanged."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Runs the unit unchanged."""
        return call(*args, **kwargs)

    def metric_call(self, metric: Any, kind: Any, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Runs the metric, and records the call."""
        return self._metrics.call(metric, kind, call, args, kwargs)
