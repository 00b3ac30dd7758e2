"""The content that one rank writes to a checkpoint, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_hybrid.checkpoint.files import file_names, sha256, sync, write_durably
from lightning_hybrid.checkpoint.plain import encode
from lightning_hybrid.spec.tensor_index import Index


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor, or a rank's shard of one."""

    group: str
    """The mapping that the tensor belongs to, such as `state_dict`."""
    name: str
    """Name of the tensor in the group; for optimizer state the name of its parameter."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    index: Index
    """Index of the shard in the whole tensor."""
    tensor: Tensor


@dataclass(frozen=True, kw_only=True)
class Content:
    """Tensors and state that one rank writes."""

    parts: list[Part] = field(default_factory=list)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Members of groups that are not tensors, by group and name."""
    document: Mapping[str, Any] = field(default_factory=dict)
    """All other state: nested Python values, which may contain tensors."""


@dataclass(frozen=True)
class RankFiles:
    """Content of the two files of a rank."""

    index: dict[str, Any]
    """Content of the state file."""
    tensors: dict[str, Tensor]
    """Content of the tensor file, by key."""

    @classmethod
    def of(cls, content: Content) -> RankFiles:
        """Encodes the state of `content`, so that later changes of it have no effect; refers to its tensors."""
        tensors: dict[str, Tensor] = {}

        def put(tensor: Tensor) -> str:
            key = str(len(tensors))
            tensors[key] = tensor.detach()
            return key

        index: dict[str, Any] = {"tensors": {}, "values": {}}
        for part in content.parts:
            entry = {"shape": list(part.shape), "index": part.index, "key": put(part.tensor)}
            index["tensors"].setdefault(part.group, {})[part.name] = entry
        for group, values in content.values.items():
            index["values"][group] = {n: encode(v, put, f"{group}.{n}") for n, v in values.items()}
        index["document"] = encode(content.document, put)
        return cls(index, tensors)

    def on_host(self) -> RankFiles:
        """Returns these files with copies of the tensors in host memory, which training does not change."""
        copied = {key: _copy(tensor) for key, tensor in self.tensors.items()}
        if any(tensor.device.type == "cuda" for tensor in self.tensors.values()):
            torch.cuda.synchronize()
        return RankFiles(self.index, copied)

    def write(self, folder: Path, rank: int) -> dict[str, dict[str, Any]]:
        """Writes both files to disk.

        Returns:
            Size in bytes and SHA-256 of each file.
        """
        state, weights = (folder / name for name in file_names(rank))
        write_durably(state, json.dumps(self.index, separators=(",", ":")).encode())
        save_file(_unshared(self.tensors), weights)
        sync(weights)
        return {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in (state, weights)}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns contiguous host tensors that share no memory, as the file format requires."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen and tensor.numel():
            tensor = tensor.clone()
        seen.add(storage)
        result[key] = tensor
    return result


def _copy(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cuda":
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)
    return tensor.clone(memory_format=torch.contiguous_format)
