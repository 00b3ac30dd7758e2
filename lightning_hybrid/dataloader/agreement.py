"""Checks on the first batch that ranks of a replica read the same data."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_hybrid.batches import SCALARS, dense_parts, leaves_of
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.dataloader.sharding import BatchWeights
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.spec.errors import PartitionError

SHARDED = (
    "Shard by `trainer.strategy.distributed_sampler_kwargs`, which has the number and the index of the replica, and "
    "not by the rank or the world size."
)
SEEDED = (
    "Make the same data on every rank: call `seed_everything(0)` before random data and `random_split`, or give them a "
    "seeded `generator`."
)


def replicas_of(mesh: Mesh, by_rank: list[Any]) -> list[list[Any]]:
    """Returns, for each replica, the values of its ranks."""
    return [[by_rank[rank] for rank in members] for members in mesh.ranks_by_replica()]


def all_read_the_same(own: int | None, mesh: Mesh, remedy: str = SHARDED) -> bool:
    """Returns True if all replicas have the same first batch. Collective.

    Args:
        own: The digest of this rank's batch.
        mesh: The mesh.
        remedy: What to do about different batches, for the error.

    Raises:
        PartitionError: If ranks of one replica have different first batches.
    """
    digests = gather_objects(own)
    by_replica = replicas_of(mesh, digests)
    for number, of_replica in enumerate(by_replica):
        if len(set(of_replica)) > 1:
            raise PartitionError(different_data(mesh, "different first batches", number, remedy))
    return len(set(digests)) == 1


def check_dataset(dataset: Any, mesh: Mesh) -> None:
    """Checks that all ranks have the same dataset, as far as classes of torch show it. Collective.

    Raises:
        PartitionError: If ranks have different datasets.
    """
    forms = gather_objects(_form_of(dataset))
    other = next((rank for rank, form in enumerate(forms) if form != forms[0]), None)
    if other is not None:
        raise PartitionError(
            f"`layout='{mesh.layout}'`: the ranks 0 and {other} have different datasets ({type(dataset).__name__}), of "
            f"which each replica would take a part: other samples, or another order of `random_split`. {SEEDED}"
        )


def _form_of(dataset: Any) -> Any:
    """Returns what a dataset shows without reading samples of the user's classes."""
    if isinstance(dataset, Subset):
        return "Subset", digest(np.asarray(dataset.indices)), _form_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return tuple(map(_form_of, dataset.datasets))
    if isinstance(dataset, TensorDataset):
        return [(tuple(t.shape), digest([t[:1], t[-1:]])) for t in dataset.tensors]
    return type(dataset).__name__


def different_data(mesh: Mesh, what: str, number: int, remedy: str = SHARDED) -> str:
    """Returns the message of the error for ranks of replica `number` that read `what`, and the `remedy`."""
    ranks = replicas_of(mesh, list(range(dist.get_world_size())))[number]
    return (
        f"`layout='{mesh.layout}'`: the ranks {', '.join(map(str, ranks))} of one replica must read the same data, "
        f"since `tp` and `pp` divide the model. They read {what}. {remedy}"
    )


def digest(batch: Any) -> int:
    """Returns a checksum that is equal for equal batches."""
    code = 0
    for part in _parts(batch):
        code = zlib.crc32(part, code)
    return code


def _parts(batch: Any) -> Iterator[bytes]:
    for path, value in leaves_of(batch):
        yield path.encode()
        if isinstance(value, Tensor):
            yield f"{tuple(value.shape)} {value.dtype}".encode()
            yield from map(_bytes_of, dense_parts(value))
        elif isinstance(value, SCALARS):
            yield str(getattr(value, "__qualname__", repr(value))).encode()
        elif isinstance(value, np.ndarray):
            yield f"{value.shape} {value.dtype}".encode() + (b"" if value.dtype.hasobject else value.tobytes())
        else:
            yield type(value).__name__.encode()


def _bytes_of(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


class CheckedShard:
    """Iterates a loader unchanged, and checks that ranks of one replica have the same first batch.

    Args:
        mesh: The mesh.
        on_yield: Called with the weights of every batch before it is yielded.
    """

    def __init__(self, mesh: Mesh, on_yield: Callable[[BatchWeights | None], None]) -> None:
        self._mesh, self._on_yield, self._checked = mesh, on_yield, False
        self.history: deque[BatchWeights | None] = deque(maxlen=8)
        self.sizes: deque[int | None] = deque(maxlen=8)

    def iterate(self, loader: Any, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Returns an iterator over the loader."""
        return self._batches(start(), getattr(loader, "batch_size", None))

    def _batches(self, iterator: Iterator[Any], size: int | None) -> Iterator[Any]:
        for batch in iterator:
            if not self._checked:
                self._checked = True
                if self._mesh.layout.devices > self._mesh.layout.replicas:
                    all_read_the_same(digest(batch), self._mesh)
            self.history.append(None)
            self.sizes.append(size)
            self._on_yield(None)
            yield batch

    def length(self, loader: Any, own: Callable[[], int]) -> int:
        """Returns the length of the user's loader."""
        return own()

    def state_dict(self) -> dict[str, Any]:
        """Returns no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignores `state`."""
