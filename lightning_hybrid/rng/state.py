"""Captures and restores the state of random number generators, for checkpoints too, and synchronizes all ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_PLAIN_KEYS = ("torch", "cuda")
"""Keys of the states of `default_generators` in the plain form."""


def default_generators(device: torch.device | None = None) -> list[torch.Generator]:
    """Returns torch's default generator of the CPU, followed by that of `device` if it is a GPU."""
    if device is None or device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()  # creates the generators
    return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]


class RNGState(NamedTuple):
    """The state of the global generators of Python and NumPy, and of some generators of torch."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: list[Tensor]
    """The states of the generators of torch; by default only that of the CPU."""

    @classmethod
    def capture(cls, generators: Sequence[torch.Generator] | None = None) -> RNGState:
        """Returns the current state.

        Args:
            generators: Generators of torch; None: the default generator of the CPU.
        """
        numpy: Any = np.random.get_state()
        return cls(random.getstate(), numpy, [g.get_state() for g in generators or default_generators()])

    def restore(self, generators: Sequence[torch.Generator] | None = None) -> None:
        """Sets the generators to this state.

        Args:
            generators: As in `capture`. Generators for which there is no state stay unchanged.
        """
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        for generator, state in zip(generators or default_generators(), self.torch, strict=False):
            generator.set_state(state)

    def equals(self, other: RNGState) -> bool:
        """Returns True if generators in this state and in `other` draw equal numbers."""
        (kind, key, *rest), (other_kind, other_key, *other_rest) = self.numpy, other.numpy
        return (
            self.python == other.python
            and (kind, rest) == (other_kind, other_rest)
            and np.array_equal(key, other_key)
            and all(map(torch.equal, self.torch, other.torch))
        )

    def plain(self) -> dict[str, Any]:
        """Returns the state of `default_generators` as plain data and tensors, for checkpoints."""
        version, words, gauss = self.python
        kind, key, *rest = self.numpy
        return {
            "python": [version, list(words), gauss],
            "numpy": [kind, torch.from_numpy(np.asarray(key).astype(np.int64)), *rest],
            **dict(zip(_PLAIN_KEYS, self.torch, strict=False)),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RNGState:
        """Returns the state whose plain form is `plain`."""
        version, words, gauss = plain["python"]
        kind, key, *rest = plain["numpy"]
        return cls(
            (version, tuple(words), gauss),
            (kind, np.asarray(key).astype(np.uint32), *rest),
            [torch.as_tensor(plain[name]) for name in _PLAIN_KEYS if name in plain],
        )


def seed_all(seed: int) -> None:
    """Seeds the global generators of Python and NumPy, and torch's generator of the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def agree(generators: Sequence[torch.Generator]) -> None:
    """Sets the RNG state, and the states of `generators`, to those of rank 0. Collective over all ranks."""
    if dist.get_world_size() == 1:
        return
    every = [*default_generators(), *generators]
    box = [RNGState.capture(every)]
    dist.broadcast_object_list(box, 0)
    if dist.get_rank() != 0:
        box[0].restore(every)


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """Restores the global generators of Python, NumPy and torch (CPU and `device`) at exit."""
    generators = default_generators(device)
    state = RNGState.capture(generators)
    try:
        yield
    finally:
        state.restore(generators)


@contextmanager
def preserved_generators(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Restores `generators` of torch at exit."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
