"""Private parts of torchmetrics, of the trainer's results and of loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.data import extract_batch_size
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_hybrid.patching import patched

Synchronize = Callable[[Metric], None]


def route_metric_sync(synchronize: Synchronize) -> Callable[[], None]:
    """Makes every torchmetrics object of this process synchronize its states by `synchronize`.

    Metrics are created anywhere and at any time (in callbacks, as copies of others), so the class is patched. A metric
    that was given a process group or a function for synchronization keeps it.

    Returns:
        A function that restores the class.
    """
    original: Any = Metric._sync_dist

    def routed(metric: Any, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        if process_group is None and metric.process_group is None and metric.dist_sync_fn is None:
            synchronize(metric)
        else:
            arguments = {} if dist_sync_fn is None else {"dist_sync_fn": dist_sync_fn}
            original(metric, process_group=process_group, **arguments)

    Metric._sync_dist = routed  # type: ignore[method-assign]

    def undo() -> None:
        Metric._sync_dist = original  # type: ignore[method-assign]

    return undo


def metric_reductions(metric: Metric) -> dict[str, Callable[[Any], Any] | None]:
    """Returns the states of a metric, with the function that reduces each over ranks."""
    return dict(metric._reductions)  # type: ignore[arg-type]


def concatenates(reduction: Callable[[Any], Any] | None) -> bool:
    """Returns True if a state's reduction concatenates the states of the ranks."""
    return reduction is dim_zero_cat


def default_state(metric: Metric, name: str) -> Any:
    """Returns the value that `reset` gives the state `name` of a metric."""
    return metric._defaults[name]


def drop_result(metric: Metric) -> None:
    """Drops the cached result of `compute`."""
    metric._computed = None


def fabric_of(module: pl.LightningModule) -> Any:
    """Returns the Fabric that a LightningModule is used with, if any."""
    return module._fabric


def counts_as_updated(metric: Metric) -> None:
    """Records an update on another rank and drops the cached result."""
    metric._update_count += 1
    metric._computed = None


def set_step_value(metric: Metric, value: Any) -> None:
    """Sets the last result of `metric(...)`, which Lightning logs for a step."""
    metric._forward_cache = value


def samples_of_running_batch(trainer: pl.Trainer) -> int | None:
    """Returns the number of samples of the running batch, as Lightning counts them; None between batches."""
    results = trainer._results
    if results is None or results.batch is None:
        return None
    return extract_batch_size(results.batch)


def running_hook(module: pl.LightningModule) -> str | None:
    """Returns the name of the hook that the trainer is running."""
    return module._current_fx_name


@contextmanager
def as_hook(module: pl.LightningModule, name: str) -> Iterator[None]:
    """Attributes `self.log` calls to the hook or step `name` instead of the one that the trainer is running."""
    running, module._current_fx_name = module._current_fx_name, name
    try:
        yield
    finally:
        module._current_fx_name = running


def watch_parts(experiment: Any, part: Callable[[Any], Any]) -> AbstractContextManager:
    """Returns a context in which `watch` of a W&B run makes histograms of `part(tensor)`, unless that is None."""
    history = getattr(experiment, "_torch", None)
    if history is None:  # a disabled run
        return nullcontext()
    original = history.log_tensor_stats

    def log_tensor_stats(tensor: Any, name: str) -> None:
        own = part(tensor)
        if own is not None:
            original(own, name)

    return patched(history, log_tensor_stats=log_tensor_stats)
