"""Loaders, samplers and fetchers of the trainer's loops."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_hybrid._lightning_private.packages import of_package, twins


def loaders_of_running_batch(trainer: pl.Trainer) -> tuple[list[Any] | None, int]:
    """Returns the loaders of the running step's batch, and the number of batches fetched since.

    The loaders are None if they are read sequentially: the batch may come from any of them.
    """
    loop: Any = trainer._active_loop
    progress = (loop.epoch_loop if loop is trainer.fit_loop else loop).batch_progress
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    ahead = 0 if fetcher is None else max(0, fetcher.fetched - progress.current.ready)
    return (None if reads_in_turn(combined) else combined.flattened), ahead


def reads_in_turn(combined: Any) -> bool:
    """Returns True if a `CombinedLoader` reads one loader after the other."""
    return combined._mode == "sequential"


def hands_out_its_iterator(trainer: pl.Trainer) -> bool:
    """Returns True if the step has an iterator (`dataloader_iter`) as argument instead of a batch."""
    return isinstance(trainer._active_loop._data_fetcher, twins(_DataLoaderIterDataFetcher))  # type: ignore[union-attr]


def takes_iterator(step: Callable[..., Any]) -> bool:
    """Returns True if a step has an iterator (`dataloader_iter`) as argument instead of a batch."""
    return is_param_in_hook_signature(step, "dataloader_iter", explicit=True)


def state_left(trainer: pl.Trainer, shard: Any) -> dict[str, Any] | None:
    """Returns and removes the checkpoint's state of the training loader with `shard`, if Lightning did not load it.

    Lightning loads no loader state after the end of an epoch.
    """
    loop: Any = trainer.fit_loop
    states, combined = loop._combined_loader_states_to_load, loop._combined_loader
    if not states or combined is None or loop.restarting:
        return None
    stateful = [loader for loader in combined.flattened if isinstance(loader, _Stateful)]
    for i, loader in enumerate(stateful):
        if getattr(loader, "replica_shard", None) is shard and i < len(states):
            state, states[i] = states[i], None
            return state
    return None


def prefetches(trainer: pl.Trainer) -> bool:
    """Returns True if the loop fetches a batch before the previous one has run, as for loaders without length."""
    return trainer._active_loop._data_fetcher.length is None  # type: ignore[union-attr]


def set_epoch(loader: Any, trainer: pl.Trainer, ahead: int = 0) -> None:
    """Sets the number of the training epoch in a loader's samplers, as Lightning does at the start of an epoch."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    _set_sampler_epoch(loader, progress.processed + ahead)


def set_epoch_length(trainer: pl.Trainer, shard: Any, length: int) -> None:
    """Sets the number of batches, in the epoch that begins, of the training loader with `shard`."""
    loop: Any = trainer.fit_loop
    combined, limit = loop._combined_loader, trainer.limit_train_batches
    limits = combined.limits  # changed in place, since the iterator has this list already
    for i, loader in enumerate(combined.flattened):
        if getattr(loader, "replica_shard", None) is shard:
            limits[i] = min(length, limit) if isinstance(limit, int) else int(length * limit)
    if loop._data_fetcher is None:
        return  # the loop reads the lengths during its setup
    loop.max_batches = loop._data_fetcher.length = (min if combined._mode == "min_size" else max)(limits)
    if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch not in (None, float("inf")):
        trainer.val_check_batch = max(1, int(loop.max_batches * trainer.val_check_interval))


def training_loaders(trainer: pl.Trainer) -> Any:
    """Returns the training loaders of the running fit, as a `CombinedLoader`."""
    return trainer.fit_loop._combined_loader


def reload_validation(trainer: pl.Trainer) -> None:
    """Makes the next validation set up its loaders again."""
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def batch_on_device(module: pl.LightningModule, batch: Any, device: Any) -> Any:
    """Runs all transfer hooks on a loader's training batch; returns the batch on `device`."""
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)


def predictions_of(trainer: pl.Trainer) -> list[list[Any]] | None:
    """Returns this rank's predictions by loader and batch; None if `return_predictions` is False."""
    loop = trainer.predict_loop
    return loop._predictions if loop.return_predictions else None


def prediction_loaders(trainer: pl.Trainer) -> list[Any]:
    """Returns the loaders of the predict loop."""
    combined = trainer.predict_loop._combined_loader
    return [] if combined is None else combined.flattened


def running_prediction(trainer: pl.Trainer) -> tuple[int, int, int]:
    """Returns the index of the running predict loader, the number of loaders, and the index of the next batch."""
    combined: Any = trainer.predict_loop._combined_loader
    iterator = combined._iterator
    return iterator._iterator_idx, len(combined.flattened), iterator._idx


def behind_index_batches(batch_sampler: Any) -> Any:
    """Returns the user's batch sampler, without Lightning's wrapper that records samples of prediction batches."""
    return (
        batch_sampler._batch_sampler if isinstance(batch_sampler, twins(_IndexBatchSamplerWrapper)) else batch_sampler
    )


class _PlainLists:
    """Makes Lightning's record of the samples of each batch one of plain lists."""

    seen_batch_indices: list[list[int]]

    def __next__(self) -> list[int]:
        batch = super().__next__()  # type: ignore[misc] -- of the other base class
        self.seen_batch_indices[-1] = list(batch)
        return batch


def recorded_indices(trainer: pl.Trainer, batch_sampler: Any) -> Any:
    """Returns a batch sampler that records the samples of each batch for prediction writers."""
    wrapper = of_package(trainer, _IndexBatchSamplerWrapper)
    return types.new_class("IndexBatches", (_PlainLists, wrapper))(batch_sampler)


def on_before_batch_transfer(module: pl.LightningModule, batch: Any, loader: int) -> Any:
    """Runs the module's hook on a batch of the loader with index `loader`."""
    return module._on_before_batch_transfer(batch, dataloader_idx=loader)


def loop_loaders(trainer: pl.Trainer) -> Any:
    """Returns the loaders that the user gives to the trainer's running function, before any loop has set them up."""
    loops: dict[Any, Any] = {
        TrainerFn.FITTING: trainer.fit_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    return loops[trainer.state.fn]._data_source.dataloader()
