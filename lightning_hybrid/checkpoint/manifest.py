"""Writes a checkpoint from all ranks and commits it atomically.

Every rank writes its files into a staging folder and puts their sizes and checksums into the store; rank 0 then writes
the manifest and renames the folder. The ranks communicate through the store only, so that a background thread can save
while training uses the process groups.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from lightning_hybrid.checkpoint.content import RankFiles
from lightning_hybrid.checkpoint.files import (
    FORMAT,
    MANIFEST,
    README,
    README_TEXT,
    put_in_place,
    remove,
    staged,
    sync,
    write_durably,
)
from lightning_hybrid.spec.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class WritingRanks:
    """This rank, and the others that write the same checkpoint."""

    store: Store
    rank: int
    world_size: int
    timeout: timedelta
    """Time after which a rank stops waiting for another."""


def write_checkpoint(
    ranks: WritingRanks, number: int, path: Path, files: RankFiles, about: dict[str, Any], after: Callable[[], None]
) -> None:
    """Writes one checkpoint. Collective: every rank calls it with the same `number` and `path`.

    Args:
        ranks: This rank and the others.
        number: Number of the checkpoint in this process.
        path: The checkpoint's folder.
        files: Content of this rank's files.
        about: Entries of the manifest beside the files: step, layout, versions.
        after: Called on rank 0 after the checkpoint is committed.

    Raises:
        CheckpointError: On every rank, if any rank could not write; earlier checkpoints are unchanged.
    """
    store, rank = ranks.store, ranks.rank
    prefix = f"lightning_hybrid/checkpoint/{number}"
    folder = staged(path)
    try:
        if rank == 0:
            try:
                remove(folder)
                folder.mkdir(parents=True)
                store.set(f"{prefix}/begin", "")
            except OSError as error:
                store.set(f"{prefix}/begin", str(error))
        problem = _wait(ranks, f"{prefix}/begin")
        report: dict[str, Any] = {"error": problem} if problem else _write(folder, files, rank)
        store.set(f"{prefix}/rank/{rank}", json.dumps(report))
        if rank == 0:
            store.set(f"{prefix}/end", _commit(ranks, prefix, path, about, after))
        problem = _wait(ranks, f"{prefix}/end")
    except DistError as error:
        raise CheckpointError(f"Saving {path} ended: another rank did not answer ({error}).") from error
    if problem:
        raise CheckpointError(f"Saving {path} failed, earlier checkpoints are untouched. {problem}")


def _wait(ranks: WritingRanks, key: str) -> str:
    ranks.store.wait([key], ranks.timeout)
    return ranks.store.get(key).decode()


def _write(folder: Path, files: RankFiles, rank: int) -> dict[str, Any]:
    try:
        return files.write(folder, rank)
    except Exception as error:  # noqa: BLE001 -- the disk or the tensor library fails in many ways; rank 0 reports it
        return {"error": f"{type(error).__name__}: {error}"}


def _commit(ranks: WritingRanks, prefix: str, path: Path, about: dict[str, Any], after: Callable[[], None]) -> str:
    """Commits the checkpoint on rank 0 after all ranks have written, or removes it; returns the problems, or `""`."""
    folder, files, problems = staged(path), {}, []
    for rank in range(ranks.world_size):
        report = json.loads(_wait(ranks, f"{prefix}/rank/{rank}"))
        if "error" in report:
            problems.append(f"Rank {rank}: {report['error']}.")
        else:
            files |= report
    try:
        if not problems:
            write_manifest(folder, {**about, "world_size": ranks.world_size, "files": files})
            put_in_place(path)
            after()
    except OSError as error:
        problems.append(f"Rank 0: {type(error).__name__}: {error}.")
    for rank in range(ranks.world_size):
        ranks.store.delete_key(f"{prefix}/rank/{rank}")
    if problems:
        with contextlib.suppress(OSError):
            remove(folder)
    return " ".join(problems)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes the manifest of a folder, which makes it a valid checkpoint."""
    text = canonical(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / README).write_text(README_TEXT)
    unfinished = folder / (MANIFEST + ".part")
    write_durably(unfinished, json.dumps({"format": FORMAT, "digest": digest, "content": content}, indent=1).encode())
    os.rename(unfinished, folder / MANIFEST)
    sync(folder)


def canonical(content: dict[str, Any]) -> str:
    """Returns the text of a manifest's content from which its digest is computed."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
