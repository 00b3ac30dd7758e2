"""The checkpoint that a trainer loads, and the folders that its callbacks save to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    OnExceptionCheckpoint,
)

from lightning_hybrid._lightning_private.packages import twins
from lightning_hybrid.patching import patched


def last_found_by(trainer: pl.Trainer, find: Callable[[], str | None]) -> AbstractContextManager:
    """Makes `find` resolve `ckpt_path="last"`; if it finds nothing, Lightning searches itself.

    Lightning uses the checkpoint named `last` even if it is incomplete, and starts from scratch if there is none.
    """
    connector: Any = trainer._checkpoint_connector
    original = type(connector)._parse_ckpt_path

    def parse(state_fn: Any, ckpt_path: Any, *, model_provided: bool, model_connected: bool) -> Any:
        found = find() if ckpt_path == "last" else None
        connector._hybrid_last = found
        connector._hybrid_path = found or original(
            connector, state_fn, ckpt_path, model_provided=model_provided, model_connected=model_connected
        )
        return connector._hybrid_path

    return patched(connector, _parse_ckpt_path=parse, _hybrid_path=None, _hybrid_last=None)


def checkpoint_of_run(trainer: pl.Trainer) -> str | None:
    """Returns the path of the checkpoint that the trainer is about to load; known from `setup` on."""
    connector: Any = trainer._checkpoint_connector
    return connector._hpc_resume_path or connector.__dict__.get("_hybrid_path")


def last_checkpoint_of_run(trainer: pl.Trainer) -> str | None:
    """Returns the path that `ckpt_path="last"` has been resolved to; None for another `ckpt_path`."""
    connector: Any = trainer._checkpoint_connector
    return connector.__dict__.get("_hybrid_last")


def checkpoint_folders(trainer: pl.Trainer) -> list[str]:
    """Returns the folders that the trainer's callbacks save checkpoints to."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined] -- set by a connector
        if isinstance(callback, twins(ModelCheckpoint)):
            found.append(str(callback._ModelCheckpoint__resolve_ckpt_dir(trainer)))  # type: ignore[attr-defined]
        elif isinstance(callback, twins(OnExceptionCheckpoint)):
            found.append(str(callback.dirpath))
    return list(dict.fromkeys(found))
