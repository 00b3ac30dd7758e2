"""Every private API of Lightning and torchmetrics that this package uses. Checked with Lightning 2.6.6.

The torchmetrics among them were checked with torchmetrics 1.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.data import extract_batch_size
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

Synchronize = Callable[[Metric], None]


def route_metric_sync(synchronize: Synchronize) -> Callable[[], None]:
    """Has every torchmetrics object of this process synchronize its states by `synchronize`, until it is undone.

    Metrics are made anywhere and at any time (in callbacks, as copies of others), so the class is where to do it.
    A metric with a process group or a function for synchronization of its own keeps them.

    Returns:
        Undoes it.
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


def find_last_by(trainer: pl.Trainer, find: Callable[[], str | None]) -> None:
    """Has `find` look for what `ckpt_path="last"` means; Lightning takes over where it finds nothing.

    Lightning takes what has the name `last`, complete or not, and starts from the beginning where that is missing.
    """
    connector: Any = trainer._checkpoint_connector
    original = type(connector)._parse_ckpt_path

    def parse(state_fn: Any, ckpt_path: Any, *, model_provided: bool, model_connected: bool) -> Any:
        found = find() if ckpt_path == "last" else None
        return found or original(
            connector, state_fn, ckpt_path, model_provided=model_provided, model_connected=model_connected
        )

    connector._parse_ckpt_path = parse


def checkpoint_folders(trainer: pl.Trainer) -> list[str]:
    """The folders that the trainer's callbacks save checkpoints to."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined] -- set by a connector
        if isinstance(callback, ModelCheckpoint):
            found.append(str(callback._ModelCheckpoint__resolve_ckpt_dir(trainer)))  # type: ignore[attr-defined]
        elif isinstance(callback, OnExceptionCheckpoint):
            found.append(str(callback.dirpath))
    return list(dict.fromkeys(found))


def metric_reductions(metric: Metric) -> dict[str, Callable[[Any], Any] | None]:
    """The states of a metric, with the function that reduces each over ranks."""
    return dict(metric._reductions)  # type: ignore[arg-type]


def concatenates(reduction: Callable[[Any], Any] | None) -> bool:
    """Whether a state's reduction joins what the ranks hold."""
    return reduction is dim_zero_cat


def counts_as_updated(metric: Metric) -> None:
    """Notes an update that another rank has made: no cached result is valid any more."""
    metric._update_count += 1
    metric._computed = None


def set_step_value(metric: Metric, value: Any) -> None:
    """Sets what `metric(...)` returned last, which Lightning logs for a step."""
    metric._forward_cache = value


def samples_of_running_batch(trainer: pl.Trainer) -> int | None:
    """Samples of the batch that the trainer's loop is at, as Lightning counts them; None between batches."""
    results = trainer._results
    if results is None or results.batch is None:
        return None
    return extract_batch_size(results.batch)


def running_hook(module: pl.LightningModule) -> str | None:
    """The hook that the trainer is running."""
    return module._current_fx_name
