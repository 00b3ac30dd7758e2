"""Saves and loads the checkpoints of a run for the strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.optim import Optimizer

from lightning_hybrid._lightning_private import checkpoint_folders
from lightning_hybrid.checkpoint import load as loading
from lightning_hybrid.checkpoint import state
from lightning_hybrid.checkpoint.options import CheckpointOptions
from lightning_hybrid.checkpoint.reader import SavedCheckpoint
from lightning_hybrid.checkpoint.save import Saver
from lightning_hybrid.checkpoint.wandb import continue_runs, logged_artifacts, runs_of
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.rng.state import RNGState, default_generators


class Checkpoints:
    """Saves and loads the checkpoints of a run.

    Args:
        options: The strategy's `checkpoints`.
        timeout: Time after which a rank stops waiting for another.

    Raises:
        ValueError: If `options` are no `CheckpointOptions`.
    """

    def __init__(self, options: CheckpointOptions, timeout: timedelta | None) -> None:
        if not isinstance(options, CheckpointOptions):
            raise ValueError(
                f"`checkpoints` must be options such as `CheckpointOptions(asynchronous=True)`. Got {options!r}."
            )
        self._options, self._timeout = options, timeout
        self._saver: Saver | None = None
        self._older: list[Path] = []
        self._rng: Mapping[str, Any] | None = None
        self._diloco: Mapping[str, Any] | None = None

    @property
    def saver(self) -> Saver:
        """The writer of checkpoints; needs the process groups."""
        if self._saver is None:
            self._saver = Saver(self._options, self._timeout)
        return self._saver

    def save(self, engine: Engine, checkpoint: Mapping[str, Any], path: str | Path) -> None:
        """Saves Lightning's checkpoint dict, which holds this rank's shards of the state. Collective."""
        with engine.run.told("save_checkpoint", "Saving a checkpoint"):
            rng = RNGState.capture(default_generators(engine.device)).plain() | engine.rng.state_dict()
            more: dict[str, Any] = {"streams": rng}
            if engine.diloco is not None:
                more["local_steps"] = {**engine.diloco.state_dict(), "optimizers": state.own_optimizer_states(engine)}
            content = state.content_of(engine, {**checkpoint, **more})
            facts = loading.manifest_facts(checkpoint, engine.mesh.layout, **runs_of(engine.run.trainer))
            self.saver.save(path, content, facts)

    def loggers_follow(self, trainer: pl.Trainer, failed: Callable[[], bool]) -> AbstractContextManager:
        """Lets loggers of W&B continue the run of the last checkpoint, and upload checkpoints within the context.

        Args:
            trainer: The trainer.
            failed: Returns True if the run has failed.
        """
        continue_runs(trainer)
        return logged_artifacts(trainer, self._options.reference_bytes, failed)

    def find_last(self, trainer: pl.Trainer) -> str | None:
        """Returns the newest checkpoint of the callbacks' folders (`ckpt_path="last"`); older ones are the fallback."""
        found = loading.valid_checkpoints([Path(folder) for folder in checkpoint_folders(trainer)])
        self._older = found[1:]
        return str(found[0]) if found else None

    def load(self, engine: Engine, path: str | Path, trust_pickle: bool) -> dict[str, Any]:
        """Returns Lightning's checkpoint dict from `path`; after `find_last` from the newest intact checkpoint."""
        self.saver.wait()
        paths: list[Any] = [Path(path), *self._older]
        box = [paths]
        dist.broadcast_object_list(box, 0)
        self._older = []
        opened = loading.open_first(box[0], self._options.trust_pickle or trust_pickle)
        if not isinstance(opened, SavedCheckpoint):
            return opened
        checkpoint = loading.as_lightning(opened, engine.root.trainer, engine.mesh.layout)
        self._rng, self._diloco = checkpoint.pop("streams"), checkpoint.pop("local_steps", None)
        return checkpoint

    def load_optimizers(self, engine: Engine, optimizers: Sequence[Optimizer], saved: Sequence[Any]) -> None:
        """Loads the states `saved` of all optimizers, and the RNG state and DiLoCo replicas of the same checkpoint."""
        for optimizer, its_state in zip(optimizers, saved, strict=True):
            state.load_optimizer_state(engine, optimizer, its_state)
        if self._rng is not None:
            RNGState.from_plain(self._rng).restore(default_generators(engine.device))
            engine.rng.load_state_dict(self._rng)
        self._restore_diloco(engine)

    def _restore_diloco(self, engine: Engine) -> None:
        """Restores each DiLoCo replica's own weights in the same layout, otherwise the last averaged weights."""
        saved, self._diloco = self._diloco, None
        if engine.diloco is None:
            return
        engine.diloco.begin()
        if saved is not None:
            engine.diloco.load_state_dict(saved)
            state.load_own_optimizer_states(engine, saved["optimizers"])

    def first_batch(self, trainer: pl.Trainer) -> None:
        """Restores the RNG state before the first batch of a resumed epoch: starting the loader has drawn numbers."""
        if self._rng is not None and trainer.training:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0:
                RNGState.from_plain(self._rng).restore(default_generators(trainer.strategy.root_device))
            self._rng = None

    def wait(self) -> None:
        """Waits for an asynchronous save to end."""
        if self._saver is not None:
            self._saver.wait()

    def abandon(self) -> None:
        """Stops waiting for an asynchronous save, after an error of the run."""
        if self._saver is not None:
            self._saver.abandon()
