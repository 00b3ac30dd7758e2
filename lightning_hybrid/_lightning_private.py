"""Every private API of Lightning, torchmetrics and wandb that this package uses. Checked with Lightning 2.6.6.

The torchmetrics among them were checked with torchmetrics 1.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from typing_extensions import override

Synchronize = Callable[[Metric], None]
TunerExit = _TunerExitException
"""Raised on all ranks where the Trainer's tuner ends a run early."""


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
        connector._hybrid_path = found or original(
            connector, state_fn, ckpt_path, model_provided=model_provided, model_connected=model_connected
        )
        return connector._hybrid_path

    connector._parse_ckpt_path = parse


def checkpoint_of_run(trainer: pl.Trainer) -> str | None:
    """What the trainer is about to load, from `setup` on; Lightning keeps it to itself until then."""
    connector: Any = trainer._checkpoint_connector
    return connector._hpc_resume_path or connector.__dict__.get("_hybrid_path")


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


def training_batch(trainer: pl.Trainer) -> int:
    """The number of the training batch that runs, over all epochs; a checkpoint has it."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def evaluation_batch(trainer: pl.Trainer) -> int:
    """The place of the evaluation batch that runs, in its loop over all dataloaders."""
    loops: dict[Any, Any] = {
        TrainerFn.FITTING: trainer.fit_loop.epoch_loop.val_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    return loops[trainer.state.fn].batch_progress.current.ready


# ---- data


class PlaceInEpoch(NamedTuple):
    """Batches of the running training epoch."""

    fetched: int
    """Taken from the loaders."""
    ready: int
    """Begun."""
    processed: int
    """Trained on."""
    completed: int
    """Trained on, with all hooks run."""


def place_in_epoch(trainer: pl.Trainer) -> PlaceInEpoch:
    """Where the training loop is."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    fetcher = trainer.fit_loop._data_fetcher
    return PlaceInEpoch(
        0 if fetcher is None else fetcher.fetched, progress.ready, progress.processed, progress.completed
    )


def loaders_of_running_batch(trainer: pl.Trainer) -> tuple[list[Any] | None, int]:
    """The loaders that the batch of the running step came from, and how many batches were taken since.

    None for loaders that are read one after the other: the batch comes from any of them.
    """
    loop: Any = trainer._active_loop
    progress = (loop.epoch_loop if loop is trainer.fit_loop else loop).batch_progress
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    ahead = 0 if fetcher is None else max(0, fetcher.fetched - progress.current.ready)
    return (None if reads_in_turn(combined) else combined.flattened), ahead


def reads_in_turn(combined: Any) -> bool:
    """Whether a `CombinedLoader` reads one loader after the other."""
    return combined._mode == "sequential"


def hands_out_its_iterator(trainer: pl.Trainer) -> bool:
    """Whether the step takes an iterator (`dataloader_iter`) instead of a batch."""
    return isinstance(trainer._active_loop._data_fetcher, _DataLoaderIterDataFetcher)  # type: ignore[union-attr]


def state_left(trainer: pl.Trainer, flow: Any) -> dict[str, Any] | None:
    """The state in the checkpoint for the training loader that iterates by `flow`, where Lightning did not load it.

    It loads none after the end of an epoch, since the next one begins anew.
    """
    loop: Any = trainer.fit_loop
    states, combined = loop._combined_loader_states_to_load, loop._combined_loader
    if not states or combined is None or loop.restarting:
        return None
    stateful = [loader for loader in combined.flattened if isinstance(loader, _Stateful)]
    for i, loader in enumerate(stateful):
        if getattr(loader, "flow", None) is flow and i < len(states):
            state, states[i] = states[i], None
            return state
    return None


def prefetches(trainer: pl.Trainer) -> bool:
    """Whether the loop takes a batch before the one before it is run, as without a length."""
    return trainer._active_loop._data_fetcher.length is None  # type: ignore[union-attr]


def set_epoch(loader: Any, trainer: pl.Trainer, ahead: int = 0) -> None:
    """Tells a loader's samplers the number of the training epoch, as Lightning does at its start."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    _set_sampler_epoch(loader, progress.processed + ahead)


def set_epoch_length(trainer: pl.Trainer, flow: Any, length: int) -> None:
    """The training loader that iterates by `flow` has `length` batches in the epoch that begins, unlike before."""
    loop: Any = trainer.fit_loop
    combined, limit = loop._combined_loader, trainer.limit_train_batches
    limits = combined.limits  # changed in place: the iterator has them already
    for i, loader in enumerate(combined.flattened):
        if getattr(loader, "flow", None) is flow:
            limits[i] = min(length, limit) if isinstance(limit, int) else int(length * limit)
    if loop._data_fetcher is None:
        return  # the loop is being set up, and will ask itself
    loop.max_batches = loop._data_fetcher.length = (min if combined._mode == "min_size" else max)(limits)
    if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch not in (None, float("inf")):
        trainer.val_check_batch = max(1, int(loop.max_batches * trainer.val_check_interval))


def predictions_of(trainer: pl.Trainer) -> list[list[Any]] | None:
    """The predictions of this rank, by loader and batch, if the user wants them returned."""
    loop = trainer.predict_loop
    return loop._predictions if loop.return_predictions else None


def prediction_loaders(trainer: pl.Trainer) -> list[Any]:
    """The loaders that are predicted on."""
    combined = trainer.predict_loop._combined_loader
    return [] if combined is None else combined.flattened


def running_prediction(trainer: pl.Trainer) -> tuple[int, int, int]:
    """Index of the loader that is predicted on, number of loaders, and index of the next batch."""
    combined: Any = trainer.predict_loop._combined_loader
    iterator = combined._iterator
    return iterator._iterator_idx, len(combined.flattened), iterator._idx


def behind_index_batches(batch_sampler: Any) -> Any:
    """The user's batch sampler, for predictions behind Lightning's, which notes the samples of each batch."""
    return batch_sampler._batch_sampler if isinstance(batch_sampler, _IndexBatchSamplerWrapper) else batch_sampler


class IndexBatches(_IndexBatchSamplerWrapper):
    """Notes the samples of each batch for prediction writers, as plain lists."""

    @override
    def __next__(self) -> list[int]:
        batch = super().__next__()
        self.seen_batch_indices[-1] = list(batch)
        return batch


def watch_parts(experiment: Any, part: Callable[[Any], Any]) -> None:
    """Has `watch` of a W&B run take `part(tensor)` of every tensor that it makes a histogram of."""
    history = getattr(experiment, "_torch", None)
    if history is None or "log_tensor_stats" in vars(history):  # none in a disabled run
        return
    original = history.log_tensor_stats
    history.log_tensor_stats = lambda tensor, name: original(part(tensor), name)


def averaged_once_per_epoch(trainer: pl.Trainer) -> list[Any]:
    """The callbacks that average weights over epochs (`_average_model` has the average)."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    return [c for c in callbacks if isinstance(c, StochasticWeightAveraging)]


def averaged_per_step(trainer: pl.Trainer) -> list[Any]:
    """The callbacks with an `AveragedModel` (in `_average_model`, made with `_kwargs`), while a module is trained."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    return [c for c in callbacks if isinstance(c, WeightAveraging) and c._average_model is not None]


def forget_schedulers_before_averaging(callback: Any, trainer: pl.Trainer) -> None:
    """For a run that goes on within the epochs that are averaged: the saved scheduler is that of the averaging."""
    if callback._scheduler_state is not None:
        callback._clear_schedulers(trainer)


def running_batch(trainer: pl.Trainer) -> int:
    """The index, in its epoch, of the training batch that runs."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1


def share_cores(processes: int) -> None:
    """Divides this machine's cores among its processes, unless the user has."""
    _set_num_threads_if_needed(num_processes=processes)


def route_sigterm(trainer: pl.Trainer, handler: Callable[..., None], before_batch: Callable[[], None]) -> None:
    """Replaces what the trainer does on SIGTERM, and what its ranks ask each other before every training batch."""
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = handler
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = before_batch


def set_received_sigterm(trainer: pl.Trainer) -> None:
    """Has the trainer's loops stop at the next place where they look for a SIGTERM."""
    trainer._signal_connector.received_sigterm = True


@contextmanager
def parameters_compared_by_identity() -> Iterator[None]:
    """Inside, `BaseFinetuning` finds out by identity, not by value, whether an optimizer has a parameter."""

    def padding(optimizer: Optimizer, params: Iterable[Any]) -> list[Any]:
        present = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [p for p in params if id(p) not in present]

    original = BaseFinetuning.__dict__["filter_on_optimizer"]
    BaseFinetuning.filter_on_optimizer = staticmethod(padding)  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseFinetuning.filter_on_optimizer = original


def detects_anomalies(trainer: pl.Trainer) -> bool:
    """The Trainer's `detect_anomaly`."""
    return trainer._detect_anomaly


# ---- accumulation


def begin_window(trainer: pl.Trainer, batches: int) -> None:
    """Gradients of `batches` batches are accumulated, counted from the training batch that is about to run.

    Lightning counts from the beginning of an epoch, in two places that disagree when the number changes: a window
    would begin in the middle of another, and steps be made with gradients of too few batches or of too many.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    progress, optimization = loop.batch_progress, loop.automatic_optimization
    first = progress.current.ready - 1
    trainer.accumulate_grad_batches = batches
    zero_grad = type(optimization)._make_zero_grad_fn
    loop._first_of_window = first
    loop._accumulated_batches_reached = lambda: (progress.current.ready - first) % batches == 0
    optimization._make_zero_grad_fn = lambda batch, optimizer: zero_grad(optimization, batch - first, optimizer)


def end_windows(trainer: pl.Trainer) -> None:
    """Lightning counts again."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop.__dict__.pop("_first_of_window", None)
    loop.__dict__.pop("_accumulated_batches_reached", None)
    loop.automatic_optimization.__dict__.pop("_make_zero_grad_fn", None)


def batches_left_in_window(trainer: pl.Trainer) -> int:
    """Batches up to the optimizer's next step, the one that is about to run included."""
    loop: Any = trainer.fit_loop.epoch_loop
    done = loop.batch_progress.current.ready - 1
    whole = trainer.accumulate_grad_batches
    left = whole - (done - loop.__dict__.get("_first_of_window", 0)) % whole
    return int(min(left, trainer.num_training_batches - done))


def steps_after_batch(trainer: pl.Trainer) -> bool:
    """Whether the optimizer makes a step with the training batch that runs, or has just run."""
    return not trainer.fit_loop._should_accumulate()


def fresh_optimizers(module: pl.LightningModule) -> list[Any]:
    """What `configure_optimizers` gives now; the trainer keeps its own."""
    made: Any = module.configure_optimizers()
    return _configure_optimizers(made)[0]


def between_steps(trainer: pl.Trainer) -> bool:
    """Whether no batch has been run since the optimizer's last step."""
    loop: Any = trainer.fit_loop.epoch_loop
    return loop.batch_progress.current.ready == 0 or loop.batch_progress.is_last_batch or steps_after_batch(trainer)


def load_validation_anew(trainer: pl.Trainer) -> None:
    """The next validation sets its loaders up again."""
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def training_loaders(trainer: pl.Trainer) -> Any:
    """The training loaders of the running fit, as a `CombinedLoader`."""
    return trainer.fit_loop._combined_loader


def batch_on_device(module: pl.LightningModule, batch: Any, device: Any) -> Any:
    """A loader's training batch after all hooks of the transfer, on `device`."""
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)
