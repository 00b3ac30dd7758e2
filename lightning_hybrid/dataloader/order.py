"""Draws the order of a user's sampler, and redraws it where a run resumes within an epoch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import SequentialSampler

from lightning_hybrid.dataloader.wrap import generators_of, keeps_its_place
from lightning_hybrid.rng.state import RNGState, agree, preserved_generators, preserved_rng


class Order:
    """Draws the order of each pass, and holds the RNG and sampler states that it is drawn from.

    Args:
        source: The user's sampler or batch sampler.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._generators: list[torch.Generator] = []
        self.drawn_from: dict[str, Any] | None = None
        """RNG state and sampler state before the order of this pass was drawn."""
        self._before_start: dict[str, Any] | None = None

    @property
    def sized(self) -> bool:
        """True if the sampler has a length."""
        return hasattr(self._source, "__len__")

    @property
    def sequential(self) -> bool:
        """True if the order is that of the dataset, which needs no random numbers."""
        return type(self._source) is SequentialSampler

    def agree(self, loader: Any) -> None:
        """Gives the generators of `loader` the same state on all ranks. Collective."""
        self._generators = generators_of(loader)
        agree(self._generators)

    def keep_for_workers(self) -> None:
        """Remembers the RNG state before workers start, which draws a seed that an uninterrupted run does not draw."""
        self._before_start = self._current_state()

    def preserved_generators(self) -> AbstractContextManager[None]:
        """Restores the loader's generators at exit."""
        return preserved_generators(self._generators)

    def draw(self, used: int) -> Any:
        """Returns the order of this pass; the same one if it has been drawn already.

        Args:
            used: Number of keys that were used before.
        """
        if self._before_start is not None:
            # without the interruption the workers would be running, and no seed would be drawn for them
            self._restore(self._before_start)
            self._before_start = None
        if self.sequential:
            return range(len(self._source))
        if self.drawn_from is None:
            self.drawn_from = self._current_state()
            return self._materialized()
        with preserved_rng():
            self._restore(self.drawn_from)
            return self._materialized() if self.sized else self._redrawn(used, self.drawn_from["streams"])

    def _redrawn(self, used: int, drawn_from: dict[str, Any]) -> Any:
        keys = iter(self._source)
        read = list(islice(keys, used))
        if not RNGState.from_plain(drawn_from).equals(RNGState.capture()):
            raise ValueError(
                f"The sampler {type(self._source).__name__} has no length and draws from the global random generators, "
                "so a run cannot resume within an epoch. Give the sampler its own `torch.Generator`, or a `__len__`."
            )
        return chain(read, keys)

    def _materialized(self) -> Any:
        # at once, so that nothing between steps can change it; a sampler without length is read as it is iterated
        return list(self._source) if self.sized else iter(self._source)

    def _current_state(self) -> dict[str, Any]:
        return {"streams": RNGState.capture().plain(), **self.owned()}

    def _restore(self, state: dict[str, Any]) -> None:
        RNGState.from_plain(state["streams"]).restore()
        self.set_owned(state)

    def owned(self) -> dict[str, list[Any]]:
        """Returns the states of the loader's generators and samplers."""
        return {
            "generators": [g.get_state() for g in self._generators],
            "samplers": [s.state_dict() for s in self._stateful()],
        }

    def set_owned(self, states: dict[str, Any]) -> None:
        """Restores the states of the loader's generators and samplers."""
        for generator, state in zip(self._generators, states["generators"], strict=False):
            generator.set_state(torch.as_tensor(state))
        for sampler, state in zip(self._stateful(), states["samplers"], strict=False):
            sampler.load_state_dict(state)

    def _stateful(self) -> list[Any]:
        return [s for s in (self._source, getattr(self._source, "sampler", None)) if keeps_its_place(s)]
