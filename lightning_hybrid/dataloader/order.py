"""The order that a user's sampler gives, drawn once, and again where a run goes on in the middle of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import SequentialSampler

from lightning_hybrid.dataloader.wrap import generators_of, keeps_its_place
from lightning_hybrid.rng.state import RNGState, agree, preserved_generators, preserved_rng


class Order:
    """The order of one pass after the other, and the states of what it is drawn from.

    Args:
        source: The user's sampler or batch sampler.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._generators: list[torch.Generator] = []
        self.drawn_from: dict[str, Any] | None = None
        """The RNG state and the sampler's state before the order of this pass was drawn."""
        self._before_start: dict[str, Any] | None = None

    @property
    def sized(self) -> bool:
        """Whether the sampler has a length."""
        return hasattr(self._source, "__len__")

    @property
    def sequential(self) -> bool:
        """Whether nothing is drawn."""
        return type(self._source) is SequentialSampler

    def agree(self, loader: Any) -> None:
        """The generators of this loader have the same states on all ranks. Collective."""
        self._generators = generators_of(loader)
        agree(self._generators)

    def keep_for_workers(self) -> None:
        """The next order is drawn as if workers that are there already were not started by this pass."""
        self._before_start = self._present()

    def preserved_generators(self) -> AbstractContextManager[None]:
        """Restores the loader's generators at exit."""
        return preserved_generators(self._generators)

    def draw(self, used: int) -> Any:
        """The order, or the same again where it was drawn already.

        Args:
            used: How many of it are used already.
        """
        if self._before_start is not None:
            # without the interruption the workers would be there, and no seed have been drawn for them
            self._restore(self._before_start)
            self._before_start = None
        if self.sequential:
            return range(len(self._source))
        if self.drawn_from is None:
            self.drawn_from = self._present()
            return self._materialized()
        with preserved_rng():
            self._restore(self.drawn_from)
            return self._materialized() if self.sized else self._drawn_again(used, self.drawn_from["streams"])

    def _drawn_again(self, used: int, drawn_from: dict[str, Any]) -> Any:
        keys = iter(self._source)
        read = list(islice(keys, used))
        if not RNGState.from_plain(drawn_from).equals(RNGState.capture()):
            raise ValueError(
                f"The sampler {type(self._source).__name__} has no length and draws from the global random generators, "
                "so a run cannot go on in the middle of its order. Give it a `torch.Generator` of its own, or a "
                "`__len__`."
            )
        return chain(read, keys)

    def _materialized(self) -> Any:
        # at once, so that what happens between steps cannot change it; an endless sampler is read as it goes
        return list(self._source) if self.sized else iter(self._source)

    def _present(self) -> dict[str, Any]:
        return {"streams": RNGState.capture().plain(), **self.owned()}

    def _restore(self, state: dict[str, Any]) -> None:
        RNGState.from_plain(state["streams"]).restore()
        self.set_owned(state)

    def owned(self) -> dict[str, list[Any]]:
        """The states of what the loader owns."""
        return {
            "generators": [g.get_state() for g in self._generators],
            "samplers": [s.state_dict() for s in self._stateful()],
        }

    def set_owned(self, states: dict[str, Any]) -> None:
        """Gives it these states again."""
        for generator, state in zip(self._generators, states["generators"], strict=False):
            generator.set_state(torch.as_tensor(state))
        for sampler, state in zip(self._stateful(), states["samplers"], strict=False):
            sampler.load_state_dict(state)

    def _stateful(self) -> list[Any]:
        return [s for s in (self._source, getattr(self._source, "sampler", None)) if keeps_its_place(s)]
