"""Progress, signals and settings of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import _TunerExitException

from lightning_hybrid.patching import patched

TunerExit = _TunerExitException
"""Raised on all ranks where the Trainer's tuner ends a run early."""


def training_batch(trainer: pl.Trainer) -> int:
    """Returns the number of the running training batch over all epochs, which checkpoints contain."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def evaluation_batch(trainer: pl.Trainer) -> int:
    """Returns the number of the running evaluation batch, in its loop over all dataloaders."""
    loops: dict[Any, Any] = {
        TrainerFn.FITTING: trainer.fit_loop.epoch_loop.val_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    return loops[trainer.state.fn].batch_progress.current.ready


def running_batch(trainer: pl.Trainer) -> int:
    """Returns the index of the running training batch in its epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1


class PlaceInEpoch(NamedTuple):
    """Numbers of batches of the running training epoch."""

    fetched: int
    """Fetched from the loaders."""
    ready: int
    """Started."""
    processed: int
    """Trained on."""
    completed: int
    """Trained on, with all hooks run."""


def place_in_epoch(trainer: pl.Trainer) -> PlaceInEpoch:
    """Returns the position of the training loop in its epoch."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    fetcher = trainer.fit_loop._data_fetcher
    return PlaceInEpoch(
        0 if fetcher is None else fetcher.fetched, progress.ready, progress.processed, progress.completed
    )


def logs_after_batch(trainer: pl.Trainer) -> bool:
    """Returns True if loggers get the values of the running step of the optimizer, by `log_every_n_steps` alone.

    Equal on all ranks, unlike `trainer.should_stop`, at which Lightning logs, too.
    """
    every = trainer.log_every_n_steps  # type: ignore[attr-defined] -- set by a connector
    return every > 0 and (logged_step(trainer) + 1) % every == 0


def logged_step(trainer: pl.Trainer) -> int:
    """Returns the step under which loggers get the values of the running training batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


@contextmanager
def fetching_seen(trainer: pl.Trainer, begins: Callable[[], None], ends: Callable[[], None]) -> Iterator[None]:
    """Calls `begins` and `ends` around each wait of the training loop for the next batch of the loader."""
    profiler, start, stop = trainer.profiler, trainer.profiler.start, trainer.profiler.stop  # type: ignore[attr-defined]
    action = "].train_dataloader_next"

    def started(name: str) -> None:
        if name.endswith(action):
            begins()
        start(name)

    def stopped(name: str) -> None:
        stop(name)
        if name.endswith(action):
            ends()

    with patched(profiler, start=started, stop=stopped):
        yield


def share_cores(processes: int) -> None:
    """Divides this machine's cores among its processes, unless the user has set the number of threads."""
    _set_num_threads_if_needed(num_processes=processes)


@contextmanager
def sigterm_routed(
    trainer: pl.Trainer, handler: Callable[..., None], before_batch: Callable[[], None]
) -> Iterator[None]:
    """Replaces what the trainer does on SIGTERM, and what its ranks ask each other before every training batch."""
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    with patched(connector, _sigterm_notifier_fn=handler), patched(loop, _broadcast_sigterm_tensor=before_batch):
        yield


@contextmanager
def before_stop_is_read(trainer: pl.Trainer, call: Callable[[], None]) -> Iterator[None]:
    """Calls `call` after every training batch and between epochs, before the loops read `trainer.should_stop`."""
    connector, fit, epoch = trainer._logger_connector, trainer.fit_loop, trainer.fit_loop.epoch_loop
    end_batch, advanced = connector.on_batch_end, epoch.on_advance_end

    def on_batch_end() -> None:
        end_batch()
        if trainer.training:  # evaluation loops call it, too
            call()

    def on_advance_end(data_fetcher: Any) -> None:
        validated = epoch.val_loop.batch_progress.total.ready
        advanced(data_fetcher)
        if epoch.val_loop.batch_progress.total.ready != validated:
            call()

    def followed(method: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            method()
            call()

        return run

    between = ("setup_data", "on_run_start", "on_advance_start", "on_advance_end")
    with (
        patched(connector, on_batch_end=on_batch_end),
        patched(epoch, on_advance_end=on_advance_end),
        patched(fit, **{name: followed(getattr(fit, name)) for name in between}),
    ):
        yield


def set_received_sigterm(trainer: pl.Trainer) -> None:
    """Makes the trainer's loops stop at their next check for a SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def detects_anomalies(trainer: pl.Trainer) -> bool:
    """Returns the Trainer's `detect_anomaly`."""
    return trainer._detect_anomaly


def fresh_optimizers(module: pl.LightningModule) -> tuple[list[Any], list[Any]]:
    """Calls `configure_optimizers`, and returns optimizers and schedulers; those of the trainer are not changed."""
    configured: Any = module.configure_optimizers()
    optimizers, schedulers, _ = _configure_optimizers(configured)
    return optimizers, [s["scheduler"] if isinstance(s, dict) else s for s in schedulers]


def evaluation_loops(trainer: pl.Trainer) -> list[Any]:
    """Returns the loops that evaluate: within `fit`, `validate`, `test` and `predict`."""
    return [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]


def injects_sampler(trainer: pl.Trainer) -> bool:
    """Returns the Trainer's `use_distributed_sampler`."""
    return trainer._accelerator_connector.use_distributed_sampler


def sampler_injection(trainer: pl.Trainer, enabled: bool) -> AbstractContextManager:
    """Sets the Trainer's `use_distributed_sampler` for the duration of the context."""
    return patched(trainer._accelerator_connector, use_distributed_sampler=enabled)


def after_closure_of(precision: Precision) -> Callable[..., None]:
    """Returns the method of the plugin's class that runs between a closure and the optimizer's update."""
    return type(precision)._after_closure.__get__(precision)


def post_backward_of(precision: Precision) -> Callable[..., Any]:
    """Returns the method of the plugin's class that runs between a backward pass and `on_after_backward`."""
    return type(precision).post_backward.__get__(precision)


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Returns the user's optimizer behind a `LightningOptimizer`; any other optimizer is returned as it is."""
    return getattr(optimizer, "_optimizer", optimizer)
