"""Writing a checkpoint from all ranks together: it is there as a whole, or not at all.

Every rank writes its files into a staging folder and tells the store their sizes and hashes; rank 0 then writes the
manifest and gives the folder its name. The ranks talk through the store only, so that a background thread can do this
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
from lightning_hybrid.checkpoint.files import FORMAT, MANIFEST, put_in_place, remove, staged, sync, write_durably
from lightning_hybrid.spec.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Party:
    """The ranks that write together."""

    store: Store
    rank: int
    world_size: int
    timeout: timedelta
    """How long one rank waits for another."""


def write_checkpoint(
    party: Party, number: int, path: Path, files: RankFiles, about: dict[str, Any], after: Callable[[], None]
) -> None:
    """Writes one checkpoint; every rank calls it with the same `number` and `path`.

    Args:
        party: This rank and the others.
        number: Counts the checkpoints of this run.
        path: The checkpoint's folder.
        files: What this rank writes.
        about: What the manifest says beside the files: step, layout, versions.
        after: Called on rank 0 once the checkpoint is in place.

    Raises:
        CheckpointError: On every rank, if any rank could not write; what was there before is untouched.
    """
    store, rank = party.store, party.rank
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
        problem = _wait(party, f"{prefix}/begin")
        report: dict[str, Any] = {"error": problem} if problem else _write(folder, files, rank)
        store.set(f"{prefix}/rank/{rank}", json.dumps(report))
        if rank == 0:
            store.set(f"{prefix}/end", _commit(party, prefix, path, about, after))
        problem = _wait(party, f"{prefix}/end")
    except DistError as error:
        raise CheckpointError(f"Saving {path} ended: another rank did not answer ({error}).") from error
    if problem:
        raise CheckpointError(f"Saving {path} failed, earlier checkpoints are untouched. {problem}")


def _wait(party: Party, key: str) -> str:
    party.store.wait([key], party.timeout)
    return party.store.get(key).decode()


def _write(folder: Path, files: RankFiles, rank: int) -> dict[str, Any]:
    try:
        return files.write(folder, rank)
    except Exception as error:  # noqa: BLE001 -- the disk or the tensor library fails in many ways; rank 0 reports it
        return {"error": f"{type(error).__name__}: {error}"}


def _commit(party: Party, prefix: str, path: Path, about: dict[str, Any], after: Callable[[], None]) -> str:
    """Rank 0: waits for all, and completes the checkpoint or takes it away. Returns what went wrong, or nothing."""
    folder, files, problems = staged(path), {}, []
    for rank in range(party.world_size):
        report = json.loads(_wait(party, f"{prefix}/rank/{rank}"))
        if "error" in report:
            problems.append(f"Rank {rank}: {report['error']}.")
        else:
            files |= report
    try:
        if not problems:
            write_manifest(folder, {**about, "world_size": party.world_size, "files": files})
            put_in_place(path)
            after()
    except OSError as error:
        problems.append(f"Rank 0: {type(error).__name__}: {error}.")
    for rank in range(party.world_size):
        party.store.delete_key(f"{prefix}/rank/{rank}")
    if problems:
        with contextlib.suppress(OSError):
            remove(folder)
    return " ".join(problems)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes the manifest of a folder; from then on the folder is a checkpoint."""
    text = canonical(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    passing = folder / (MANIFEST + ".part")
    write_durably(passing, json.dumps({"format": FORMAT, "digest": digest, "content": content}, indent=1).encode())
    os.rename(passing, folder / MANIFEST)
    sync(folder)


def canonical(content: dict[str, Any]) -> str:
    """The text of a manifest's content that its digest is taken of."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
