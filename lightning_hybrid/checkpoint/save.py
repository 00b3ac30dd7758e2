"""Saves checkpoints while training continues, and removes old ones only when newer ones are complete."""

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
from lightning_hybrid.checkpoint.manifest import WritingRanks, write_checkpoint
from lightning_hybrid.checkpoint.options import CheckpointOptions
from lightning_hybrid.checkpoint.reader import newest_first
from lightning_hybrid.spec.errors import CheckpointError

_GRACE_SECONDS = 5.0
"""Longest time that a save delays the end of a failed run; other ranks may have ended, so it may never complete."""


class Saver:
    """Saves this rank's shards; all ranks call the methods in the same order.

    Args:
        options: The strategy's `checkpoints`.
        timeout: Time after which a rank stops waiting for another.
    """

    def __init__(self, options: CheckpointOptions, timeout: timedelta | None) -> None:
        self._options = options
        self._ranks = WritingRanks(
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
        """Saves a checkpoint; an asynchronous save completes later, see `wait`.

        Args:
            path: The checkpoint's folder, on a file system shared by all ranks.
            content: Tensors and state of this rank.
            about: Entries of the manifest that describe the checkpoint.

        Raises:
            CheckpointError: On every rank, if this save or the asynchronous one before failed and `on_error="raise"`.
        """
        self.wait()
        path = _local(path)
        files = RankFiles.of(content)
        # counted in the store, which savers of later trainers of this process share
        number = self._ranks.store.add(f"lightning_hybrid/checkpoints_of_rank/{self._ranks.rank}", 1)
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
            CheckpointError: If the save failed and `on_error="raise"`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._report()

    def remove(self, path: str | Path) -> None:
        """Removes a checkpoint as soon as `keep` newer ones are complete."""
        if self._ranks.rank == 0:
            self._unwanted.append(_local(path))
            if self._thread is None:
                self._remove_unwanted()

    def _write(self, number: int, path: Path, files: RankFiles, about: dict[str, Any]) -> None:
        try:
            write_checkpoint(self._ranks, number, path, files, about, self._saved)
        except CheckpointError as error:
            self._error, self._failed = error, True

    def _report(self) -> None:
        error, self._error = self._error, None
        if error is None:
            return
        if self._options.on_error == "raise":
            raise error
        rank_zero_warn(f"{error} Training continues without this checkpoint.", category=RuntimeWarning)

    def _saved(self) -> None:
        self._failed = False
        self._remove_unwanted()

    def _remove_unwanted(self) -> None:
        kept, count = [], self._options.keep
        for path in self._unwanted:
            newest = newest_first(list(candidates(path.parent)))[:count]
            # callbacks remove old checkpoints after a save; if the save failed, the old one is the newest
            if path in newest and (count > 1 or self._failed):
                kept.append(path)
            else:
                try:
                    remove(path)
                except OSError as error:
                    warnings.warn(f"The old checkpoint {path} could not be removed: {error}.", stacklevel=2)
        self._unwanted = kept

    def abandon(self) -> None:
        """Gives an asynchronous save a few seconds to complete after an error of the run, and ignores its result."""
        if self._thread is not None:
            self._thread.join(_GRACE_SECONDS)
        self._thread = self._error = None


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise CheckpointError(
            f"Checkpoints are written to a folder on a file system shared by all ranks. Got {path}, which is remote. "
            "Save to a local or network folder and copy the result."
        )
    return Path(path).absolute()
