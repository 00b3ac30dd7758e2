"""Seeds the random generators for every sample that is read.

Random numbers drawn by `dataset[i]` and `collate_fn` (augmentations, masks) come from generators that are seeded with
the loader's seed of this epoch and the sample's position in the global order. So samples do not depend on the layout,
the number of workers, or where a run was resumed, and ranks of one replica read equal samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Subset, get_worker_info

from lightning_hybrid.rng.state import RNGState, seed_all
from lightning_hybrid.rng.step import mix

_COLLATE = 1
"""Makes the seed of `collate_fn` differ from that of the first sample."""


class Keys(list):
    """The keys of a batch, with their positions in the global order and the seed of the epoch."""

    def __init__(self, keys: Sequence[Any], positions: Sequence[int], seed: int) -> None:
        super().__init__(keys)
        self.positions, self.seed = positions, seed

    def __reduce__(self) -> tuple[Any, ...]:
        return Keys, (list(self), self.positions, self.seed)


class Key(NamedTuple):
    """The key of one sample, for loaders without batches."""

    key: Any
    position: int
    seed: int


class Seeding:
    """State that `SeededSamples` and `SeededCollate` of one loader share between reading and collating samples."""

    def __init__(self) -> None:
        self.outside: RNGState | None = None
        """The RNG state to restore after collating, in the main process."""

    def begin(self) -> None:
        """Captures the RNG state of the main process before samples are read."""
        if get_worker_info() is None:
            self.outside = RNGState.capture()

    def end(self) -> None:
        """Restores the RNG state after the batch is complete or has failed."""
        if self.outside is not None:
            self.outside.restore()
            self.outside = None


class SeededSamples:
    """Wraps a map-style dataset for the loader's fetcher: each sample is read with its own seed.

    A dataset with `__getitems__` reads a batch at once, with the seed of the batch's first sample.
    """

    def __init__(self, dataset: Any, seeding: Seeding) -> None:
        self.dataset, self._seeding = dataset, seeding

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Keys) -> Any:
        self._seeding.begin()
        try:
            first = keys.positions[0] if keys.positions else 0
            if _reads_together(self.dataset):
                seed_all(mix(keys.seed, first))
                samples = self.dataset.__getitems__(list(keys))
            else:
                samples = []
                for key, position in zip(keys, keys.positions, strict=True):
                    seed_all(mix(keys.seed, position))
                    samples.append(self.dataset[key])
            seed_all(mix(keys.seed, first, _COLLATE))
        except BaseException:
            self._seeding.end()
            raise
        return samples

    def __getitem__(self, key: Key) -> Any:
        self._seeding.begin()
        try:
            seed_all(mix(key.seed, key.position))
            return self.dataset[key.key]
        except BaseException:
            self._seeding.end()
            raise


def _reads_together(dataset: Any) -> bool:
    """Returns True if `dataset` reads a batch at once; a torch `Subset` does so if the dataset behind it does."""
    while isinstance(dataset, Subset) and type(dataset).__getitems__ is Subset.__getitems__:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


class SeededCollate:
    """Wraps a loader's `collate_fn`, which draws from generators that `SeededSamples` has seeded."""

    def __init__(self, collate: Callable[[Any], Any], seeding: Seeding) -> None:
        self._collate, self._seeding = collate, seeding

    def __call__(self, samples: Any) -> Any:
        """Returns the result of the user's function."""
        try:
            return self._collate(samples)
        finally:
            self._seeding.end()


class WorkerInit:
    """Wraps the user's `worker_init_fn`; `get_worker_info().dataset` is the user's dataset."""

    def __init__(self, user: Callable[[int], Any] | None) -> None:
        self._user = user

    def __call__(self, worker: int) -> None:
        """Runs the user's function in the worker, before any sample is read."""
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # the info is frozen, and in some releases has slots
        if self._user is not None:
            self._user(worker)
