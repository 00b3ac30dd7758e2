"""The names of things on disk: one folder a checkpoint, which is there as a whole or not at all.

step=20.ckpt/              a checkpoint
    manifest.json          written last: what every file must be
    rank-00000.json        the rank's state, and which parts of which tensors it has written
    rank-00000.safetensors these parts
step=30.ckpt.tmp/          being written, or left by a run that was killed
last.ckpt.replaced/        the one before, for the moment in which `last.ckpt` is exchanged
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
FORMAT = "lightning_hybrid/1"
STAGED, REPLACED = ".tmp", ".replaced"
FILE_NAME = re.compile(r"rank-\d{5,}\.(json|safetensors)")
"""Names that a manifest may list: none leads out of the folder."""


def staged(path: Path) -> Path:
    """Where the checkpoint `path` is written before it gets its name."""
    return path.with_name(path.name + STAGED)


def file_names(rank: int) -> tuple[str, str]:
    """The state file and the tensor file of a rank."""
    return f"rank-{rank:05d}.json", f"rank-{rank:05d}.safetensors"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(path: Path) -> None:
    """Gives a complete staged checkpoint its name; what had the name goes only when the new one is there."""
    before = path.with_name(path.name + REPLACED)
    if path.exists() or path.is_symlink():
        remove(before)
        os.rename(path, before)
    os.rename(staged(path), path)
    sync(path.parent)
    remove(before)


def remove(path: Path) -> None:
    """Removes a checkpoint of any kind, if it is there; the manifest first, so that no half of one looks whole."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            (path / MANIFEST).unlink()
        shutil.rmtree(path)


def candidates(folder: Path) -> Iterator[Path]:
    """Everything in a folder that may be a checkpoint, also what a killed run left complete under a passing name."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if (path / MANIFEST).is_file() or (path.is_file() and path.suffix == ".ckpt"):
                yield path
