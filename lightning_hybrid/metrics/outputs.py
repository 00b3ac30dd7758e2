"""Joins the outputs of `training_step` beside the loss over the microbatches of a pipeline."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_hybrid.spec.errors import PartitionError

NOT_JOINED = "_hybrid_not_joined"
"""Key of the message of a `NotJoinedError` in what the last stage sends to the other stages."""


class NotJoinedError(PartitionError):
    """A value that a step returns cannot be made for the whole batch from those of its microbatches."""


def extras(out: Any) -> dict[str, Any]:
    """Returns the entries of a step's output beside the loss, detached from their graphs."""
    if not isinstance(out, Mapping):
        return {}
    return {k: apply_to_collection(v, Tensor, Tensor.detach) for k, v in out.items() if k != "loss"}


def join(parts: list[dict[str, Any]], samples: list[int]) -> dict[str, Any]:
    """Returns one dictionary for the whole batch from those of its microbatches.

    Tensors with the samples on dim 0 and lists with one element per sample are concatenated; scalar tensors and numbers
    are averaged, weighted by samples; everything else must be the same in all parts.

    Args:
        parts: The dictionary of each microbatch.
        samples: The number of samples of each microbatch.

    Raises:
        NotJoinedError: If a value can be neither joined nor averaged.
    """
    return _join(parts, samples, "training_step")


def _join(parts: list[Any], samples: list[int], path: str) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(_form(p) != _form(first) for p in parts):
        raise _not_joined(first, path)
    if isinstance(first, Mapping):
        return {k: _join([p[k] for p in parts], samples, f"{path}[{k!r}]") for k in first}
    if isinstance(first, Tensor):
        joined = _join_tensors(parts, samples)
        if joined is not None:
            return joined
    elif isinstance(first, numbers.Number) and not isinstance(first, bool):
        return sum(p * n for p, n in zip(parts, samples, strict=True)) / sum(samples)
    elif isinstance(first, list) and all(len(p) == n for p, n in zip(parts, samples, strict=True)):
        return [item for p in parts for item in p]
    elif isinstance(first, list | tuple) and len({len(p) for p in parts}) == 1:
        items = [_join([p[i] for p in parts], samples, f"{path}[{i}]") for i in range(len(first))]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    elif all(p == first for p in parts):
        return first
    raise _not_joined(first, path)


def _form(value: Any) -> Any:
    """Returns what the parts of a value must have in common: the keys of a mapping, or the length of a tuple."""
    if isinstance(value, Mapping):
        return list(value)
    return len(value) if isinstance(value, tuple) else isinstance(value, Tensor)


def _not_joined(value: Any, path: str) -> NotJoinedError:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return NotJoinedError(
        f"`{path}` is a {type(value).__name__}{shape} that differs between microbatches. What `training_step` returns "
        "beside the loss must have the samples on dim 0, or be a number, to be joined under `pp`. Return it in one of "
        "these forms, leave it out, or set `microbatches=1`."
    )


def _join_tensors(parts: list[Tensor], samples: list[int]) -> Tensor | None:
    first = parts[0]
    if all(p.ndim and len(p) == n for p, n in zip(parts, samples, strict=True)):
        return torch.cat(parts)
    if first.numel() == 1:
        weights = torch.tensor(samples, device=first.device, dtype=torch.float64) / sum(samples)
        mean = (torch.stack([p.reshape(()).double() for p in parts]) * weights).sum()
        return mean.to(first.dtype if first.is_floating_point() else torch.float32).reshape(first.shape)
    return first if all(p.shape == first.shape and torch.equal(p, first) for p in parts) else None
