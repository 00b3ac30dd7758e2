"""Loaders, samplers and fetchers of the trainer's loops."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from typing_extensions import override


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


def training_loaders(trainer: pl.Trainer) -> Any:
    """The training loaders of the running fit, as a `CombinedLoader`."""
    return trainer.fit_loop._combined_loader


def load_validation_anew(trainer: pl.Trainer) -> None:
    """The next validation sets its loaders up again."""
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def batch_on_device(module: pl.LightningModule, batch: Any, device: Any) -> Any:
    """A loader's training batch after all hooks of the transfer, on `device`."""
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)


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
