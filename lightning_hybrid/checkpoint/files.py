"""Files and folders of checkpoints: one folder per checkpoint, committed atomically.

step=20.ckpt/              a checkpoint
    README.txt             says how to make a single file of the folder
    manifest.json          written last: size and checksum of every file
    rank-00000.json        the rank's state, and the index of each tensor shard that it has written
    rank-00000.safetensors these tensor shards
step=30.ckpt.tmp/          staging folder: being written, or left by a run that was killed
last.ckpt.replaced/        the previous checkpoint, while `last.ckpt` is replaced
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
README = "README.txt"
README_TEXT = """\
This folder is one checkpoint, saved by lightning_hybrid: one part per rank.

torch.load, load_from_checkpoint and a Trainer with another strategy read single files. Make one with

    pip install lightning-hybrid
    lightning-hybrid consolidate THIS_FOLDER out.ckpt            (or out.safetensors, for the weights only)

Trainer(strategy=HybridStrategy(...)).fit(model, ckpt_path=THIS_FOLDER) reads the folder, in any layout.
"""
FORMAT = "lightning_hybrid/1"
STAGED, REPLACED = ".tmp", ".replaced"
FILE_NAME = re.compile(r"rank-\d{5,}\.(json|safetensors)")
"""Names that a manifest may list: no paths outside the folder."""


_OF_OTHERS = (".metadata", "latest", "checkpoint")
"""Files and folders in checkpoints of Lightning's sharded FSDP and of DeepSpeed."""


def not_a_checkpoint(path: Path) -> str | None:
    """Returns why `path`, which exists, cannot be a checkpoint, without reading it; None if it may be one."""
    if path.is_dir():
        if any((path / name).exists() for name in (MANIFEST, *_OF_OTHERS)):
            return None
        return (
            f"{path} is not a checkpoint: it is a folder without {MANIFEST}. If a run was to write it, the run was "
            "interrupted. Use an earlier checkpoint."
        )
    with open(path, "rb") as file:
        begin = file.read(2)
    if begin == b"PK" or begin[:1] == b"\x80":  # a zip file; a pickle
        return None
    return f"{path} is not a checkpoint: it is no file of `torch.save`, as checkpoints of Lightning are."


def staged(path: Path) -> Path:
    """Returns the staging folder of the checkpoint `path`."""
    return path.with_name(path.name + STAGED)


def file_names(rank: int) -> tuple[str, str]:
    """Returns the names of the state file and the tensor file of a rank."""
    return f"rank-{rank:05d}.json", f"rank-{rank:05d}.safetensors"


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(path: Path) -> None:
    """Commits a complete staged checkpoint by renaming it; removes a previous one of that name afterwards."""
    before = path.with_name(path.name + REPLACED)
    if path.exists() or path.is_symlink():
        remove(before)
        os.rename(path, before)
    os.rename(staged(path), path)
    sync(path.parent)
    remove(before)


def remove(path: Path) -> None:
    """Removes a checkpoint of any kind, if it exists; the manifest first, so that a partial one is never valid."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            (path / MANIFEST).unlink()
        shutil.rmtree(path)


def candidates(folder: Path) -> Iterator[Path]:
    """Yields every path in a folder that may be a checkpoint, complete staging folders of killed runs included."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if (path / MANIFEST).is_file() or (path.is_file() and path.suffix == ".ckpt"):
                yield path
