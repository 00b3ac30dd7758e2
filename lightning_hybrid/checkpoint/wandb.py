"""Weights & Biases: checkpoints as artifacts, and the same run after resuming.

Lightning's `WandbLogger(log_model=True)` uploads files, and checkpoints are folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_hybrid._lightning_private import (
    artifact_name,
    checkpoints_passed,
    last_checkpoint_of_run,
    logged_times,
    options_of,
    run_id,
    saved_scores,
    set_run_id,
    wandb_loggers,
)
from lightning_hybrid.checkpoint.files import MANIFEST, sha256
from lightning_hybrid.checkpoint.reader import read_manifest

RUNS = "wandb_runs"
"""Entry of the manifest: ids of the runs of all `WandbLogger`s, in their order; None for a run that has not begun."""


class CheckpointArtifacts:
    """Logs the checkpoints of a run as artifacts of one logger, each folder when it is complete.

    Args:
        logger: The `WandbLogger`.
        reference_bytes: Size from which an artifact refers to the folder instead of containing its files.
    """

    def __init__(self, logger: Any, reference_bytes: int | None) -> None:
        self._logger, self._reference_bytes = logger, reference_bytes
        self._waiting: dict[str, tuple[Any, Any]] = {}
        """Score and callback of the checkpoints that are not logged yet, by path."""

    def add(self, callback: Any) -> None:
        """Logs the checkpoints of a `ModelCheckpoint` that are complete, oldest first; the others later."""
        for path, score in saved_scores(callback).items():
            self._waiting[path] = score, callback
        found = [(m.stat().st_mtime, path) for path in self._waiting if (m := Path(path) / MANIFEST).is_file()]
        logged = logged_times(self._logger)
        for seconds, path in sorted(found):
            score, callback = self._waiting.pop(path)
            # a link is to a checkpoint that has a path of its own; the name `last` is used again
            if not Path(path).is_symlink() and logged.get(path, 0.0) < seconds:
                self._log(Path(path), score, callback)
                logged[path] = seconds

    def _log(self, folder: Path, score: Any, callback: Any) -> None:
        import wandb

        about = read_manifest(folder)
        facts = {"layout": about["layout"], "step": about["step"], "manifest_sha256": sha256(folder / MANIFEST)}
        metadata = {"score": score, "original_filename": folder.name, **options_of(callback), **facts}
        artifact = wandb.Artifact(name=artifact_name(self._logger), type="model", metadata=metadata)
        size = sum(file["bytes"] for file in about["files"].values())
        if self._reference_bytes is not None and size >= self._reference_bytes:
            # the manifest has the checksum of every file, so that another content is another version
            artifact.add_file(str(folder / MANIFEST), name=MANIFEST)
            artifact.add_reference(folder.absolute().as_uri(), name="files", checksum=False)
        else:
            artifact.add_dir(str(folder), policy=self._logger.add_file_policy)
        aliases = ["latest", "best"] if str(folder) == callback.best_model_path else ["latest"]
        self._logger.experiment.log_artifact(artifact, aliases=aliases)


@contextmanager
def logged_artifacts(trainer: pl.Trainer, reference_bytes: int | None, failed: Callable[[], bool]) -> Iterator[None]:
    """Makes `WandbLogger(log_model=...)` upload checkpoint folders, as Lightning uploads files.

    Args:
        trainer: The trainer.
        reference_bytes: Size from which an artifact refers to the folder instead of containing its files.
        failed: Returns True if the run has failed.
    """
    with ExitStack() as stack:
        for logger in wandb_loggers(trainer) if trainer.is_global_zero else ():
            artifacts = CheckpointArtifacts(logger, reference_bytes)
            stack.enter_context(checkpoints_passed(logger, artifacts.add, failed))
        yield


def runs_of(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the entry of the manifest with the runs of W&B; nothing if there are none."""
    loggers = wandb_loggers(trainer)
    return {RUNS: [run_id(logger) for logger in loggers]} if loggers else {}


def continue_runs(trainer: pl.Trainer) -> None:
    """Continues the runs of the checkpoint of `ckpt_path="last"`, unless loggers have an `id`. Before runs begin."""
    path = last_checkpoint_of_run(trainer)
    if path is None or not (Path(path) / MANIFEST).is_file():
        return
    saved = read_manifest(Path(path)).get(RUNS, [])
    for logger, found in zip(wandb_loggers(trainer), saved, strict=False):
        if found is not None and run_id(logger) is None:
            set_run_id(logger, found)
