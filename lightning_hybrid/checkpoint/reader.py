"""Reads a checkpoint after its manifest and checksums have been verified; runs no code from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_hybrid.checkpoint.files import FILE_NAME, FORMAT, MANIFEST, REPLACED, STAGED, file_names, sha256
from lightning_hybrid.checkpoint.manifest import canonical
from lightning_hybrid.checkpoint.plain import decode
from lightning_hybrid.spec.errors import CheckpointError
from lightning_hybrid.spec.tensor_index import Index, overlaps, shape_of, whole_index

OPTIMIZER_STATES = "optimizer_states"
"""Prefix of the groups with optimizer state: `optimizer_states/<number>/<entry>`."""
HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")
"""Keys that Lightning saves for `load_from_checkpoint` only."""
_BOXES_READ_SINGLY = 8
"""Overlapping boxes above which a stored shard is read whole: one long read is faster than many short ones."""


class _Stored(NamedTuple):
    rank: int
    key: str
    index: Index


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint, of which any shard can be read."""

    checkpoint: SavedCheckpoint
    name: str
    shape: tuple[int, ...]
    stored: list[_Stored]

    def read(self, index: Index | None = None) -> Tensor:
        """Returns the shard `index` of the tensor (None: the whole), on the CPU.

        Raises:
            CheckpointError: If elements are missing in the checkpoint.
        """
        index = whole_index(self.shape) if index is None else index
        out: Tensor | None = None
        if math.prod(self.shape) and not math.prod(shape_of(index)):
            return torch.empty(shape_of(index), dtype=self.dtype)  # a rank without a shard: more ranks than rows
        filled = 0
        for rank, key, source_index in self.stored:
            boxes = list(overlaps(index, source_index))
            if not boxes and math.prod(self.shape):
                continue
            source = self.checkpoint.slices(rank, key, self.name, shape_of(source_index))
            if len(boxes) > _BOXES_READ_SINGLY:
                source = source[...]
            for box in boxes:
                values = source[box.source] if box.source else source[...]
                if out is None:
                    out = torch.empty(shape_of(index), dtype=values.dtype)
                out[box.target] = values
                filled += box.count
            if out is None:
                out = source[...]
        if out is None or filled != out.numel():
            raise CheckpointError(
                f"{self.checkpoint.path} has {filled} of the requested elements of `{self.name}`, whose shape is "
                f"{self.shape}: files of different checkpoints are mixed, or a rank's file is missing."
            )
        return out

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the elements."""
        rank, key, _ = self.stored[0]
        return self.checkpoint.tensor(rank, key).dtype


def whole(value: Any) -> Any:
    """Returns the whole tensor of a `SavedTensor`, and any other value unchanged."""
    return value.read() if isinstance(value, SavedTensor) else value


class SavedCheckpoint:
    """A checkpoint on disk whose manifest has been verified.

    Args:
        path: The checkpoint's folder.
        trust_pickle: Whether to run pickles in state files.

    Raises:
        CheckpointError: If the checkpoint does not exist, is incomplete, or has another format.
    """

    def __init__(self, path: str | Path, trust_pickle: bool = False) -> None:
        self.path, self.trust_pickle = Path(path), trust_pickle
        self.about = read_manifest(self.path)
        self._open: dict[int, Any] = {}
        self._indexes: dict[int, dict[str, Any]] = {}

    @property
    def step(self) -> int:
        """The global step at which the checkpoint was saved."""
        return int(self.about.get("step", 0))

    @property
    def world_size(self) -> int:
        """The number of ranks that wrote the checkpoint."""
        return int(self.about["world_size"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size and checksum of each file, by name."""
        return self.about["files"]

    def problems(self, names: Sequence[str] | None = None) -> list[str]:
        """Returns the problems of the files `names` (None: all); reads every byte of them."""
        return [p for name in (self.files if names is None else names) if (p := self._problem(name, self.files[name]))]

    def _problem(self, name: str, expected: Mapping[str, Any]) -> str | None:
        path = self.path / name
        rank = int(name[5:].split(".")[0])
        if not path.is_file():
            return f"{path} (rank {rank}) is missing."
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path} (rank {rank}) has {size} bytes instead of {expected['bytes']}: it was cut off or exchanged."
        if sha256(path) != expected["sha256"]:
            return f"{path} (rank {rank}) is damaged: its SHA-256 is not the one in the manifest."
        return None

    # ---- content

    def document(self, rank: int = 0, leave_out_pickles: Sequence[str] = ()) -> dict[str, Any]:
        """Returns the state of a rank, without the groups of tensors.

        Args:
            rank: The rank that saved the state.
            leave_out_pickles: Top-level keys that are left out if they contain pickles that are not trusted.
        """
        index = self._index(rank)
        source = str(self.path / file_names(rank)[0])
        result = {}
        for key, value in index["document"].items():
            try:
                result[key] = decode(value, lambda k: self.tensor(rank, k), self.trust_pickle, source)
            except CheckpointError:
                if key not in leave_out_pickles:
                    raise
        return result

    @cached_property
    def groups(self) -> dict[str, dict[str, SavedTensor]]:
        """All tensors, by group and name."""
        found: dict[str, dict[str, SavedTensor]] = {}
        for rank in range(self.world_size):
            for group, tensors in self._index(rank)["tensors"].items():
                members = found.setdefault(group, {})
                for name, entry in tensors.items():
                    index = tuple(tuple((int(a), int(b)) for a, b in runs) for runs in entry["index"])
                    saved = members.setdefault(name, SavedTensor(self, name, tuple(entry["shape"]), []))
                    saved.stored.append(_Stored(rank, entry["key"], index))
        return found

    @cached_property
    def values(self) -> dict[str, dict[str, Any]]:
        """Members of groups that are not tensors, by group and name."""
        found: dict[str, dict[str, Any]] = {}
        for rank in range(self.world_size):
            source = str(self.path / file_names(rank)[0])
            for group, values in self._index(rank)["values"].items():
                for name, value in values.items():
                    found.setdefault(group, {}).setdefault(
                        name, decode(value, lambda k, r=rank: self.tensor(r, k), self.trust_pickle, source)
                    )
        return found

    def group(self, name: str) -> dict[str, Any]:
        """Returns a group's tensors and other members under all their names, in the order of the module's names."""
        members: dict[str, Any] = {**self.groups.get(name, {}), **self.values.get(name, {})}
        document = self._index(0)["document"]
        members |= {alias: members[first] for alias, first in document["aliases"].items() if first in members}
        order = [n for n in document["names"] if n in members]
        return {n: members[n] for n in [*order, *(n for n in members if n not in order)]}

    @property
    def model_groups(self) -> list[str]:
        """The groups with entries for names of the module: `state_dict`, and similar mappings that hooks have added."""
        return sorted(g for g in {*self.groups, *self.values} if not g.startswith(OPTIMIZER_STATES))

    def optimizer_entries(self, number: int) -> dict[str, dict[str, Any]]:
        """Returns the state of optimizer `number`, by parameter name and entry."""
        prefix = f"{OPTIMIZER_STATES}/{number}/"
        entries: dict[str, dict[str, Any]] = {}
        for groups in (self.groups, self.values):
            for group, members in groups.items():
                if group.startswith(prefix):
                    for name, value in members.items():
                        entries.setdefault(name, {})[group.removeprefix(prefix)] = value
        return entries

    def tensor(self, rank: int, key: str) -> Tensor:
        """Returns a tensor of a rank's file."""
        path = self.path / file_names(rank)[1]
        try:
            return self._file(rank).get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} (rank {rank}) cannot be read: {error}.") from error

    def slices(self, rank: int, key: str, name: str, shape: tuple[int, ...]) -> Any:
        """Returns a lazy tensor of a rank's file, of which `[...]` reads slices; its shape must be `shape`."""
        path = self.path / file_names(rank)[1]
        try:
            found = self._file(rank).get_slice(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} (rank {rank}) cannot be read: {error}.") from error
        if tuple(found.get_shape()) != shape:
            raise CheckpointError(
                f"{path} (rank {rank}): the part of `{name}` has shape {tuple(found.get_shape())}, not {shape} as its "
                "index says."
            )
        return found

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            self._open[rank] = safe_open(self.path / file_names(rank)[1], framework="pt")
        return self._open[rank]

    def _index(self, rank: int) -> dict[str, Any]:
        if rank not in self._indexes:
            path = self.path / file_names(rank)[0]
            try:
                self._indexes[rank] = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} (rank {rank}) cannot be read: {error}.") from error
        return self._indexes[rank]


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint's manifest.

    Raises:
        CheckpointError: If there is no checkpoint, or its manifest is damaged.
    """
    file = path / MANIFEST
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint {path}.")
    if path.is_file():
        raise CheckpointError(f"{path} is a file. A checkpoint that `HybridStrategy` has saved is a folder.")
    if not file.is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no {MANIFEST}. The run that wrote it was interrupted."
        )
    try:
        read = json.loads(file.read_bytes())
        form, content, digest = read["format"], read["content"], read["digest"]
        if form != FORMAT:
            raise CheckpointError(f"{file} is of the format {form!r}; this version reads {FORMAT!r}.")
        intact = hashlib.sha256(canonical(content).encode()).hexdigest() == digest
        complete = set(_names(content["world_size"])) == set(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__} ({error}).") from error
    if not intact:
        raise CheckpointError(f"{file} is damaged: its content does not match its digest.")
    if not complete or not all(FILE_NAME.fullmatch(name) for name in content["files"]):
        raise CheckpointError(f"{file} does not list the files of {content['world_size']} ranks.")
    return content


def _names(world_size: int) -> Iterator[str]:
    for rank in range(world_size):
        yield from file_names(rank)


def saved_callback_state(path: str | Path | None, key: str) -> dict[str, Any]:
    """Returns the state of callback `key` in a checkpoint that is not loaded yet; `{}` if there is none."""
    if path is None or not (Path(path) / MANIFEST).is_file():
        return {}
    callbacks = SavedCheckpoint(path).document(leave_out_pickles=("callbacks",)).get("callbacks", {})
    return dict(callbacks.get(key, {}))


def newest_first(paths: Sequence[Path]) -> list[Path]:
    """Returns the checkpoints with a valid manifest, newest first: by step, then by time of writing."""
    found = []
    for path in paths:
        try:
            about = read_manifest(path)
        except CheckpointError:
            continue
        staging = path.name.endswith((STAGED, REPLACED))
        found.append((int(about.get("step", 0)), float(about.get("seconds", 0.0)), not staging, str(path), path))
    return [entry[-1] for entry in sorted(found, reverse=True)]
