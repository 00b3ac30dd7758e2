"""Saving checkpoints while training goes on, and removing old ones only when newer ones are there."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hybrid._torch_private import store_client
from lightning_hybrid.checkpoint.content import Content, RankFiles
from lightning_hybrid.checkpoint.files import candidates, remove
from lightning_hybrid.checkpoint.manifest import Party, write_checkpoint
from lightning_hybrid.checkpoint.options import CheckpointOptions
from lightning_hybrid.checkpoint.reader import newest_first
from lightning_hybrid.spec.errors import CheckpointError

_GRACE_SECONDS = 5.0
"""How long the end of a failed run is held up by a save; other ranks may be gone, and it may never end."""


class Saver:
    """This rank's side of saving; every rank has one and calls it in the same order.

    Args:
        options: The strategy's `checkpoints`.
        timeout: How long one rank waits for another.
    """

    def __init__(self, options: CheckpointOptions, timeout: timedelta | None) -> None:
        self._options = options
        self._party = Party(
            store=store_client(),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            timeout=timeout or timedelta(days=1),
        )
        self._thread: Thread | None = None
        self._error: CheckpointError | None = None
        self._failed = False
        self._unwanted: list[Path] = []

    def save(self, path: str | Path, content: Content, about: dict[str, Any]) -> None:
        """Saves one checkpoint; with the asynchronous option it may be complete later, see `wait`.

        Args:
            path: The checkpoint's folder, on a file system that all ranks see.
            content: What this rank saves.
            about: What the manifest says of it.

        Raises:
            CheckpointError: On every rank, if this save or the asynchronous one before failed and `on_error="raise"`.
        """
        self.wait()
        path = _local(path)
        files = RankFiles.of(content)
        # counted in the store, which savers of later trainers of this process share
        number = self._party.store.add(f"lightning_hybrid/checkpoints_of_rank/{self._party.rank}", 1)
        if self._options.asynchronous:
            files = files.on_host()
            self._thread = Thread(target=self._write, args=(number, path, files, about), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(number, path, files, about)
            self._report()

    def wait(self) -> None:
        """Waits for an asynchronous save to end.

        Raises:
            CheckpointError: If it failed and `on_error="raise"`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._report()

    def remove(self, path: str | Path) -> None:
        """Removes a checkpoint once enough newer ones are there, which may be when the next one is complete."""
        if self._party.rank == 0:
            self._unwanted.append(_local(path))
            if self._thread is None:
                self._remove_unwanted()

    def _write(self, number: int, path: Path, files: RankFiles, about: dict[str, Any]) -> None:
        try:
            write_checkpoint(self._party, number, path, files, about, self._saved)
        except CheckpointError as error:
            self._error, self._failed = error, True

    def _report(self) -> None:
        error, self._error = self._error, None
        if error is None:
            return
        if self._options.on_error == "raise":
            raise error
        rank_zero_warn(f"{error} Training goes on without this checkpoint.", category=RuntimeWarning)

    def _saved(self) -> None:
        self._failed = False
        self._remove_unwanted()

    def _remove_unwanted(self) -> None:
        kept, count = [], self._options.keep
        for path in self._unwanted:
            newest = newest_first(list(candidates(path.parent)))[:count]
            # a callback asks for this after a save; where that failed, the old one is the last
            if path in newest and (count > 1 or self._failed):
                kept.append(path)
            else:
                try:
                    remove(path)
                except OSError as error:
                    warnings.warn(f"The old checkpoint {path} could not be removed: {error}.", stacklevel=2)
        self._unwanted = kept

    def abandon(self) -> None:
        """After an error of the run: what is being written has a little time to be completed, and is forgotten."""
        if self._thread is not None:
            self._thread.join(_GRACE_SECONDS)
        self._thread = self._error = None


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise CheckpointError(
            f"Checkpoints are written to a folder on a file system that all ranks see. Got {path}, which is remote. "
            "Save to a local or network folder and copy the result."
        )
    return Path(path).absolute()
