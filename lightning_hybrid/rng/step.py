"""Seeds the generators from which model code draws random numbers in a step, under every layout.

The rule. A step preserves the RNG state that samplers, initial weights and the user's code between steps share, so that
this state stays equal on all ranks. Within a step,

1. a microbatch begins with generators seeded from (base seed, number of the training batch, microbatch, replica). The
   base seed is that of `seed_everything` or `torch.manual_seed`; the number of the batch is Lightning's own count, so a
   resumed run draws the same numbers as an uninterrupted run, and only the base seed is saved;
2. the generators are seeded again when a unit (a block, or a module beside the blocks) is entered and when it is left,
   by the unit's position in the step. A pipeline stage that begins in the middle of the model thus draws the same
   numbers there as a single process: dropout masks do not depend on where a model is cut, nor on `dp`, `fsdp` or
   sharding, as long as a microbatch has the same samples;
3. under `tp`, values that all ranks hold whole have equal masks, since the generators of all ranks have the same state.
   Where a block works on a rank's own channels or heads, each rank seeds its generators differently, and afterwards
   restores the common state. Compiled blocks draw from the common state there, too: one mask for the heads of all
   ranks.

Evaluation steps draw from (base seed, name of the step, position of the batch in its loop, replica). `random` and
NumPy's legacy generator are seeded once per microbatch only, not per unit.

Activation checkpointing: `torch.utils.checkpoint` restores the generators' states of the forward pass, and with each
state the seed from which it began. Seeds form a chain, each derived from the one before, and seeds of a step carry a
mark. Therefore a unit that is entered in the backward pass finds the same seed as in the forward pass, and stores
nothing.
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
"""Number of random bits of a seed. Generators of the CPU use the lower 32, generators of CUDA all."""
_INSIDE = 1 << _BITS
"""Bit that is set while a rank's generators are seeded differently from those of other ranks."""
_MARK = 0x2D39A << (_BITS + 1)
"""Mark of a step's seeds: an arbitrary number above the random bits, very unlikely in a user's seed."""
_ENTERED, _LEFT, _TRAINING = 1, 2, 3
_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """Returns a seed from whole numbers, by the finalizer of SplitMix64 (Steele et al., 2014, figure 15)."""
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
        """The seed of the run; equal on all ranks, since they have the RNG state of rank 0."""
        self._replica, self._tensor_rank = replica, tensor_rank
        self._device, self._generators = device, default_generators(device)
        self._key: tuple[int, ...] = ()
        self._common: dict[int, list[torch.Tensor]] = {}
        """The common states at the entry of a divided region, by this rank's seed in the region."""
        self._equal = False
        self._seeded: list[torch.Tensor] = []
        """The generators' states after the last seed, while ranks are seeded alike."""
        self.has_drawn = False
        """True if random numbers were drawn since `equal_on_all_ranks` began."""

    def state_dict(self) -> dict[str, int]:
        """Returns the state from which a resumed run draws the same numbers."""
        return {"base_seed": self.base_seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the base seed to that of the saved run."""
        self.base_seed = int(state["base_seed"])

    # ---- steps

    @contextmanager
    def training(self, batch: int) -> Iterator[None]:
        """Preserves the RNG state around a training step, whose microbatches begin with `begin`.

        Args:
            batch: The number of the training batch, counted over all epochs.
        """
        with self._step((_TRAINING, batch)):
            yield

    @contextmanager
    def evaluation(self, step: str, place: int) -> Iterator[None]:
        """Preserves the RNG state around an evaluation step, whose microbatches begin with `begin`.

        Args:
            step: The name of the step.
            place: The position of the batch in its loop.
        """
        with self._step((zlib.crc32(step.encode()), place)):
            yield

    @contextmanager
    def _step(self, key: tuple[int, ...]) -> Iterator[None]:
        self._key = key
        self._common.clear()
        with preserved_rng(self._device):
            yield
            self._note_draws()

    def _note_draws(self) -> None:
        states = zip(self._generators, self._seeded, strict=False)
        self.has_drawn |= any(not torch.equal(generator.get_state(), state) for generator, state in states)

    @contextmanager
    def equal_on_all_ranks(self) -> Iterator[None]:
        """Seeds all microbatches, replicas and ranks of `tp` alike for the duration of the context.

        Afterwards `has_drawn` tells whether steps have drawn random numbers of torch.
        """
        self._equal, self.has_drawn = True, False
        try:
            yield
        finally:
            self._equal, self._seeded = False, []

    def begin(self, microbatch: int) -> None:
        """Seeds all generators for `microbatch` of the step."""
        place = (0, 0) if self._equal else (microbatch, self._replica)
        seed = mix(self.base_seed, *self._key, *place)
        self._seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    # ---- units

    def enter_unit(self) -> int | None:
        """Seeds the generators for a unit that is called; returns the argument of `leave_unit`."""
        seed = torch.default_generator.initial_seed()
        if not _is_marked(seed):
            return None  # not in a step, or the user's code has seeded the generator
        self._seed(mix(seed, _ENTERED))
        return seed

    def leave_unit(self, seed: int | None) -> None:
        """Seeds the generators after a unit has returned; `seed` is that which `enter_unit` has returned."""
        if seed is not None:
            self._seed(mix(seed, _LEFT))

    # ---- in a divided region

    def enter_region(self, name: str) -> None:
        """Seeds this rank's generators differently for a divided region, which begins with the module `name`."""
        seed = torch.default_generator.initial_seed()
        if self._equal or not _is_marked(seed) or seed & _INSIDE:
            return
        own = mix(seed, zlib.crc32(name.encode()), self._tensor_rank) | _INSIDE
        self._common[own] = [g.get_state() for g in self._generators]
        self._seed(own)

    def leave_region(self) -> None:
        """Restores the common state of the generators, after a divided region."""
        seed = torch.default_generator.initial_seed()
        if _is_marked(seed) and seed & _INSIDE and seed in self._common:
            for generator, state in zip(self._generators, self._common[seed], strict=True):
                generator.set_state(state)

    def _seed(self, seed: int) -> None:
        # as `torch.manual_seed`, which also formats a stack trace for every kind of device that is not in use
        self._note_draws()
        for generator in self._generators:
            generator.manual_seed(seed)
        if self._equal:
            self._seeded = [generator.get_state() for generator in self._generators]
