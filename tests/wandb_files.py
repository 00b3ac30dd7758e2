"""Reads the file that an offline run of Weights & Biases has written."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] -- made at import

BLOCK, HEADER = 32768, 7
"""Bytes of a block, and of the header of the file and of each of its chunks: checksum, length and kind."""


def _chunks(data: bytes) -> Iterator[bytes]:
    """The records of a W&B file, which is a log of LevelDB: chunks that are whole records, or parts from 2 to 4."""
    assert data[:4] == b":W&B"
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK  # too little is left of the block for a header
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        assert kind in (1, 2, 3, 4), f"no kind of chunk: {kind}"
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            yield parts
            parts = b""


def files(folder: Path) -> list[Path]:
    """The files of all offline runs in a folder, oldest first."""
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def records(path: Path) -> Iterator[Any]:
    """The records of the file of a run."""
    return (Record.FromString(data) for data in _chunks(path.read_bytes()))


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines and the configuration in the file of a run."""
    lines: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            line: dict[str, Any] = {}
            for item in record.history.item:
                key, *rest = [item.key] if item.key else item.nested_key
                value = json.loads(item.value_json)
                line[key] = {**line.get(key, {}), "/".join(rest): value} if rest else value
            lines.append({k: v for k, v in line.items() if not k.startswith("_")})
        updates = record.config.update if kind == "config" else record.run.config.update if kind == "run" else []
        for item in updates:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return lines, config


def values_of(path: Path, key: str) -> list[Any]:
    """The values that an entry of the configuration has had, one after the other."""
    found = []
    for record in records(path):
        kind = record.WhichOneof("record_type")
        updates = record.config.update if kind == "config" else record.run.config.update if kind == "run" else []
        found += [json.loads(item.value_json) for item in updates if (item.key or "/".join(item.nested_key)) == key]
    return found


def artifacts(path: Path, kind: str = "model") -> list[Any]:
    """The artifacts in the file of a run."""
    found = (r.artifact for r in records(path) if r.WhichOneof("record_type") == "artifact")
    return [artifact for artifact in found if artifact.type == kind]
