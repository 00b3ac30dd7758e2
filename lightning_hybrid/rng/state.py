"""The random streams of data loading: kept, written down, and seeded anew for every sample.

What `dataset[i]` and `collate_fn` draw (augmentations, masks) comes from streams that are seeded from the loader's seed
of this epoch and the sample's place in the global order. So it does not depend on the layout, on the number of workers,
or on where a run was resumed, and ranks of one replica read equal samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def capture() -> dict[str, Any]:
    """The global streams of Python, NumPy and torch, as plain data and tensors."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(key).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }


def restore(streams: Mapping[str, Any]) -> None:
    """The reverse of `capture`."""
    version, words, gauss = streams["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, *rest = streams["numpy"]
    np.random.set_state((kind, np.asarray(key).astype(np.uint32), *rest))
    torch.set_rng_state(torch.as_tensor(streams["torch"]))


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states that were captured are equal."""
    (_, key, *place), (_, other_key, *other_place) = one["numpy"], other["numpy"]
    return (
        list(one["python"]) == list(other["python"])
        and torch.equal(torch.as_tensor(key), torch.as_tensor(other_key))
        and place == other_place
        and torch.equal(torch.as_tensor(one["torch"]), torch.as_tensor(other["torch"]))
    )


def _put_back(states: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def seed_all(seed: int) -> None:
    """Seeds the global streams of Python, NumPy and torch's CPU generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def agree(generators: Sequence[torch.Generator]) -> None:
    """All ranks take the global streams of rank 0, and the states of its `generators`; collective over all ranks."""
    if dist.get_world_size() == 1:
        return
    box: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    box += [g.get_state() for g in generators]
    dist.broadcast_object_list(box, 0)
    if dist.get_rank() != 0:
        _put_back((box[0], box[1], box[2]))
        for generator, state in zip(generators, box[3:], strict=True):
            generator.set_state(state)


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """The random generators of Python, NumPy and torch (CPU and `device`) are afterwards as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
