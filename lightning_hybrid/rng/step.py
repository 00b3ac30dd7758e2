"""Random numbers that model code draws in a step: which seed the generators have, under every layout.

The rule. A step leaves the RNG state that samplers, initial weights and the user's code between steps share as it was,
so that this state stays equal on all ranks. Within a step,

1. a microbatch begins with generators seeded from (base seed, number of the training batch, microbatch, replica). The
   base seed is the one that `seed_everything` or `torch.manual_seed` gave; the batch's number is Lightning's own count,
   so a resumed run draws what the uninterrupted one would have drawn, and only the base seed is saved;
2. the generators are seeded again when a unit (a block, or a module beside the blocks) is entered and when it is left,
   by its position in the step. A pipeline stage that begins in the middle of the model thus draws what one process
   draws there: dropout masks do not depend on where a model is cut, nor on `dp`, `fsdp` or sharding, as long as a
   microbatch has the same samples;
3. under `tp`, values that all ranks hold whole take equal masks, since the generators of all ranks have the same state.
   Where a block works on a rank's own channels or heads, each rank seeds its generators differently, and afterwards
   restores the common state. Compiled blocks draw there from the common state, too: one mask for the heads of all
   ranks.

Evaluation steps draw from (base seed, name of the step, place of the batch in its loop, replica). `random` and NumPy's
legacy generator are seeded once a microbatch only, not by unit.

With recomputation: `torch.utils.checkpoint` restores the generators' states of the forward pass, and with a state the
seed it began from. Seeds are a chain, each derived from the one before, and seeds of a step carry a mark. So a unit
that is entered in the backward pass finds the seed that it found in the forward pass, and needs no memory.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lightning_hybrid.rng.state import default_generators, preserved_rng

_BITS = 44
"""Random bits of a seed. Generators of the CPU use the lower 32, those of CUDA all."""
_INSIDE = 1 << _BITS
"""Set while a rank's generators are seeded differently from those of the others."""
_MARK = 0x2D39A << (_BITS + 1)
"""Which seeds are a step's: an arbitrary number above the random bits. A user's seed is very unlikely to have it."""
_ENTERED, _LEFT, _TRAINING = 1, 2, 3
_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """A seed from whole numbers, by the finalizer of SplitMix64 (Steele et al., 2014, figure 15)."""
    value = 0
    for part in parts:
        value = ((value ^ (part & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return _MARK | (value & (_INSIDE - 1))


def _is_marked(seed: int) -> bool:
    return seed >> (_BITS + 1) == _MARK >> (_BITS + 1)


class StepRNG:
    """Seeds the generators of one rank; see the module docstring for the rule.

    Args:
        device: This rank's device.
        replica: Index of this rank's replica.
        tensor_rank: This rank's index on the `tp` axis.
    """

    def __init__(self, device: torch.device, replica: int, tensor_rank: int) -> None:
        self.base_seed = torch.initial_seed() % 2**63
        """Equal on all ranks, which have taken the RNG state of rank 0 before."""
        self._replica, self._tensor_rank = replica, tensor_rank
        self._device, self._generators = device, default_generators(device)
        self._key: tuple[int, ...] = ()
        self._common: dict[int, list[torch.Tensor]] = {}
        """The common states where a rank entered a divided region, by the seed that it has there."""

    def state_dict(self) -> dict[str, int]:
        """Returns what a resumed run needs to draw the same numbers."""
        return {"base_seed": self.base_seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the base seed of the run that was saved."""
        self.base_seed = int(state["base_seed"])

    # ---- steps

    @contextmanager
    def training(self, batch: int) -> Iterator[None]:
        """Around a training step; its microbatches begin with `begin`.

        Args:
            batch: The number of the training batch, over all epochs.
        """
        with self._step((_TRAINING, batch)):
            yield

    @contextmanager
    def evaluation(self, step: str, place: int) -> Iterator[None]:
        """Around an evaluation step.

        Args:
            step: Name of the step.
            place: The batch's place in its loop.
        """
        with self._step((zlib.crc32(step.encode()), place)):
            yield

    @contextmanager
    def _step(self, key: tuple[int, ...]) -> Iterator[None]:
        self._key = key
        self._common.clear()
        with preserved_rng(self._device):
            yield

    def begin(self, microbatch: int) -> None:
        """A microbatch of the step begins."""
        seed = mix(self.base_seed, *self._key, microbatch, self._replica)
        self._seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    # ---- units

    def enter_unit(self) -> int | None:
        """A unit is called; returns what `leave_unit` needs."""
        seed = torch.default_generator.initial_seed()
        if not _is_marked(seed):
            return None  # not in a step, or the user's code has seeded the generator
        self._seed(mix(seed, _ENTERED))
        return seed

    def leave_unit(self, seed: int | None) -> None:
        """The unit has returned."""
        if seed is not None:
            self._seed(mix(seed, _LEFT))

    # ---- inside a divided region

    def enter_region(self, name: str) -> None:
        """From here on this rank works on its own part; `name` is that of the module with which the region begins."""
        seed = torch.default_generator.initial_seed()
        if not _is_marked(seed) or seed & _INSIDE:
            return
        own = mix(seed, zlib.crc32(name.encode()), self._tensor_rank) | _INSIDE
        self._common[own] = [g.get_state() for g in self._generators]
        self._seed(own)

    def leave_region(self) -> None:
        """From here on all ranks have the same values."""
        seed = torch.default_generator.initial_seed()
        if _is_marked(seed) and seed & _INSIDE and seed in self._common:
            for generator, state in zip(self._generators, self._common[seed], strict=True):
                generator.set_state(state)

    def _seed(self, seed: int) -> None:
        # as `torch.manual_seed`, which also formats a stack trace for every kind of device that is not in use
        for generator in self._generators:
            generator.manual_seed(seed)
