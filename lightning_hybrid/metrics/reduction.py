"""Reduces logged values over replicas: packs them into one all-reduce, and unpacks the sums."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._torch_private import user_location
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.logs import LogEntry
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

_EQUAL = 1e-9
"""Relative variance of values that are equal, up to rounding. Empirical."""
_CAPACITY = 64
"""Numbers that fit into the first all-reduce of a hook; a hook that logs more needs a second all-reduce."""


def pack(entries: Sequence[LogEntry], replica: int, replicas: int) -> tuple[list[float], list[Any]]:
    """Returns the weights and the values of `entries` as numbers to sum over replicas.

    Values that are not summed (maximum, minimum, entries with `rank_zero_only`) have one slot per replica. Entries with
    `rank_zero_only` come last, since some replicas may lack them.
    """
    weights: list[float] = []
    values: list[Any] = []
    for entry in _in_order(entries):
        own = (entry.weight, entry.samples) if entry.weighted else (entry.weight,)
        if not entry.everywhere:
            weights += [n if r == replica else 0.0 for n in own for r in range(replicas)]
            values += [entry.value if r == replica else 0.0 for r in range(replicas)]
        elif entry.reduction == "mean":
            weights += own
            values.append(entry.value)
        elif entry.reduction == "sum":
            values.append(entry.value)
        else:
            values += [entry.value if r == replica else 0.0 for r in range(replicas)]
    return weights, values


def unpack(entries: Sequence[LogEntry], weights: Sequence[float], values: Tensor, replica: int, replicas: int) -> None:
    """Sets the weights and values of `entries` to those of all replicas, from sums of the numbers of `pack`.

    Args:
        entries: The same as for `pack`; entries of another stage have no values yet.
        weights: The sums of weights.
        values: The sums of values, on the device, of shape `(values,)` or longer.
        replica: The index of this replica, for `rank_zero_only`.
        replicas: Number of replicas.
    """
    w = v = 0
    for entry in _in_order(entries):
        if not entry.everywhere:
            entry.weight, entry.value = weights[w + replica], values[v + replica]
            entry.samples = weights[w + replicas + replica] if entry.weighted else entry.weight
            w, v = w + replicas * (1 + entry.weighted), v + replicas
        elif entry.reduction == "mean":
            entry.weight, entry.value = weights[w], values[v]
            entry.samples = weights[w + 1] if entry.weighted else entry.weight
            w, v = w + 1 + entry.weighted, v + 1
        elif entry.reduction == "sum":
            entry.value = values[v]
            v += 1
        else:
            of_all = values[v : v + replicas]
            entry.value = of_all.amax() if entry.reduction == "max" else of_all.amin()
            v += replicas


def _in_order(entries: Sequence[LogEntry]) -> Iterator[LogEntry]:
    for everywhere in (True, False):
        yield from (e for e in entries if e.everywhere == everywhere and e.reduction != "metric")


def as_numbers(values: Sequence[float | Tensor], device: torch.device, size: int | None = None) -> Tensor:
    """Returns `values` as a float64 tensor of shape `(size,)` on `device`, filled up with zeros; no host sync."""
    size = len(values) if size is None else size
    if not any(isinstance(v, Tensor) for v in values):
        padded = [*values, *[0.0] * (size - len(values))]
        return torch.tensor(padded, dtype=torch.float64).to(device, non_blocking=True)
    tensors = [torch.as_tensor(v, dtype=torch.float64).to(device, non_blocking=True) for v in values]
    return torch.nn.functional.pad(torch.stack(tensors), (0, size - len(values)))


def reduce_over_replicas(entries: list[LogEntry], mesh: Mesh, device: torch.device, hook: str = "") -> set[str]:
    """Reduces `entries` to those of the global batch. Collective over the replicas, which must log the same keys.

    Returns:
        The names of entries whose values differ between replicas, the same on all of them.

    Args:
        entries: This rank's entries, in order.
        mesh: The mesh.
        device: This rank's device.
        hook: The name of the hook that logged.

    Raises:
        ValueError: On every replica, if the keys differ.
    """
    replicas = mesh.layout.replicas
    if replicas == 1:
        return set()
    entries = [e for e in entries if e.everywhere]
    keys = [f"{hook}: {e.name}" if hook else e.name for e in entries]
    text = "\n".join(f"{k} {e.reduction}" for k, e in zip(keys, entries, strict=True))
    code = zlib.crc32(text.encode()) % 1_000_003
    weights, values = pack(entries, mesh.replica, replicas)
    own = [*weights, *values]
    compared = [e for e in entries if e.reduction != "metric"]
    logged = [e.value / ((e.weight or 1.0) if e.reduction == "mean" else 1.0) for e in compared]
    own += [number for value in logged for number in (value, value * value)]
    head = as_numbers([float(code), float(code * code), *own[:_CAPACITY]], device, 2 + _CAPACITY)
    dist.all_reduce(head, group=mesh.log_group)
    codes, squares, *numbers = head.tolist()
    if codes != code * replicas or squares != code * code * replicas:
        gathered: list[Any] = [None] * replicas
        dist.all_gather_object(gathered, keys, group=mesh.log_group)
        raise different_keys(gathered, user_location(), mesh.layout)
    sums = head[2:]
    if len(own) > _CAPACITY:
        rest = as_numbers(own[_CAPACITY:], device, len(own) - _CAPACITY)
        dist.all_reduce(rest, group=mesh.log_group)
        sums, numbers = torch.cat([sums, rest]), numbers + rest.tolist()
    unpack(entries, numbers[: len(weights)], sums[len(weights) :], mesh.replica, replicas)
    moments = numbers[len(own) - 2 * len(compared) : len(own)]
    pairs = zip(compared, moments[::2], moments[1::2], strict=True)
    return {e.name for e, total, squares in pairs if replicas * squares - total * total > _EQUAL * squares}


def different_keys(by_replica: list[list[str]], where: str, layout: Layout) -> PartitionError:
    """Returns the error for replicas that have logged different keys; `where` is the place in the user's code."""
    return PartitionError(
        f"`layout='{layout}'`: `self.log` must be called with the same keys on every replica, in the same order "
        f"({where}). Got {by_replica}. Log a key on all of them or on none, or with `rank_zero_only=True`, or log a "
        "`torchmetrics.Metric` if some batches have no value."
    )
