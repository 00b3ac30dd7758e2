"""Shards loaders without a sampler: iterable datasets, lists of batches, any other iterable.

The first batch shows whether the user's code shards such a stream over the replicas. If all replicas read the same
first batch, the stream is sharded here, round-robin: replica r reads number r of every R, samples of an iterable
dataset, batches of anything else. If the first batches differ, the user shards the stream, and it is left unchanged.
Lengths are not known, so the ranks gather their numbers of samples in every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hybrid._lightning_private import place_in_epoch, twins
from lightning_hybrid.batches import agreed_samples
from lightning_hybrid.dataloader import seeding, sharding
from lightning_hybrid.dataloader.agreement import all_read_the_same, different_data, digest, replicas_of
from lightning_hybrid.dataloader.map_shard import next_seed
from lightning_hybrid.dataloader.peek import preserved_position
from lightning_hybrid.dataloader.sharding import BatchWeights
from lightning_hybrid.dataloader.wrap import generators_of, keeps_its_place
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.patching import patched
from lightning_hybrid.rng.state import RNGState, agree, preserved_rng, seed_all
from lightning_hybrid.rng.step import mix
from lightning_hybrid.spec.errors import PartitionError

_END: Any = object()
_UNKNOWN = 0
"""The number of samples of a batch that does not tell it."""


class EveryNth(IterableDataset):
    """Yields sample `index` of every `count` samples of a dataset; reads all of them."""

    def __init__(self, dataset: Any, index: int, count: int, before: list[Any]) -> None:
        self.dataset, self._index, self._count, self._before = dataset, index, count, before

    def __iter__(self) -> Iterator[Any]:
        samples = chain(self._before, iter(self.dataset))
        while group := list(islice(samples, self._count)):
            if len(group) > self._index:
                yield group[self._index]


class StreamShard:
    """Shards a loader without a sampler over the replicas.

    Args:
        loader: The user's loader.
        mesh: The mesh.
        device: This rank's device, for collectives.
        training: The trainer, if its training loop iterates this loader.
        predicting: Whether the loader is used for predictions: it is then sharded by batches, and read to the end.
        limit: For predictions: Lightning's `limit_predict_batches`, which counts batches of a single process.
        run_padding: For predictions: runs a step on a padding batch, whose result is discarded.
        on_yield: Called with the weights of every batch before it is yielded.
    """

    def __init__(
        self,
        loader: Any,
        mesh: Mesh,
        device: torch.device,
        *,
        training: pl.Trainer | None,
        predicting: bool,
        limit: int | float = 1.0,
        run_padding: Callable[[Any, BatchWeights], None] | None = None,
        on_yield: Callable[[BatchWeights | None], None] = lambda _: None,
    ) -> None:
        self._mesh, self._device, self._trainer = mesh, device, training
        self._predicting, self._run_padding, self._on_yield = predicting, run_padding, on_yield
        self._limit = limit
        self._replicas, self._replica = mesh.layout.replicas, mesh.replica
        self.history: deque[BatchWeights | None] = deque(maxlen=8)
        self.sizes: deque[int | None] = deque(maxlen=8)
        is_dataset = isinstance(loader, DataLoader) and not predicting
        self._by_samples = is_dataset and isinstance(loader.dataset, IterableDataset)
        self._size = loader.batch_size if self._by_samples else None
        self._before: list[Any] = []
        """Samples that were read for the first batch and cannot be read again."""
        self._started: Iterator[Any] | None = None
        self._spare: Any = _END
        """The batch that is run as padding."""
        self._sharded_here = self._decide(loader)
        self._seed, self._passes, self._begun = 0, 0, False
        self._begun_from: torch.Tensor | None = None
        self._steps_before = self._skipped = self._yielded = 0
        self._ended = False
        self._resume: dict[str, Any] | None = None
        self._positions: deque[tuple[int, Any]] = deque(maxlen=4)
        self._counts = [0] * self._replicas
        self._padding_weights: BatchWeights | None = None
        self._warned = False

    # ---- decision who shards

    def _decide(self, loader: Any) -> bool:
        """Returns True if the stream is to be sharded here. Collective."""
        if dist.get_world_size() == 1:
            return False
        with preserved_rng(), preserved_position(loader), preserved_position(getattr(loader, "dataset", None)):
            seed_all(0)
            first = self._peek(loader)
        same = all_read_the_same(None if first is _END else digest(first), self._mesh)
        self._spare = first
        if not same or self._replicas == 1:
            return False
        kind = "sample" if self._by_samples else "batch"
        rank_zero_info(
            f"All replicas read the same first batch from {_name(loader)}, so it is not sharded: replica r of "
            f"{self._replicas} reads {kind} r, r + {self._replicas}, r + {2 * self._replicas}, ... of it."
        )
        return True

    def _peek(self, loader: Any) -> Any:
        if not self._by_samples:
            iterator = iter(loader)
            first = next(iterator, _END)
            source = getattr(loader, "dataset", None) if isinstance(loader, DataLoader) else loader
            if isinstance(source, Iterator) and first is not _END:
                self._started = chain([first], iterator)
            return first
        iterator = iter(loader.dataset)
        samples = list(islice(iterator, loader.batch_size or 1))
        if iterator is loader.dataset:  # the samples cannot be read again
            self._before = samples
        if not samples:
            return _END
        return loader.collate_fn(samples if loader.batch_size is not None else samples[0])

    # ---- one pass

    def iterate(self, loader: Any, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Returns an iterator over this replica's batches of one pass."""
        generators = generators_of(loader)
        agree(generators)
        resume = self._begin_pass(loader)
        dataset = getattr(loader, "dataset", None)
        parts: dict[str, Any] = {}
        if self._by_samples:
            index, count = (self._replica, self._replicas) if self._sharded_here else (0, 1)
            parts["dataset"] = EveryNth(dataset, index, count, self._before)
            user = loader.worker_init_fn
            if isinstance(user, partial) and user.func in twins(pl_worker_init_function):
                # a stream that is sharded here must be the same on all replicas, as on rank 0 of a single process
                user = partial(pl_worker_init_function, rank=0 if self._sharded_here else self._replica)
            parts["worker_init_fn"] = seeding.WorkerInit(user)
        with (
            preserved_rng() if resume is not None else nullcontext(),
            patched(loader, **parts) if parts else nullcontext(),
        ):
            if resume is not None and resume["begun_from"] is not None:
                torch.set_rng_state(torch.as_tensor(resume["begun_from"]))
            iterator, self._started = self._started or start(), None
        own = None
        if self._by_samples and loader.num_workers == 0:
            own = _OwnRNG(mix(self._seed, 0 if self._sharded_here else self._replica))
        if self._predicting and self._sharded_here and not isinstance(self._limit, float):
            iterator = islice(iterator, self._limit)
        iterator = self._skip(dataset, iterator, own, resume)
        self._before = []
        return self._steps(iterator, dataset, own, bool(getattr(loader, "drop_last", False)))

    def _begin_pass(self, loader: Any) -> dict[str, Any] | None:
        resume, self._resume = self._resume, None
        place = place_in_epoch(self._trainer) if self._trainer is not None else None
        if resume is not None and resume["complete"] and place is not None and place.completed < place.processed:
            resume = None
        self._begun, self._ended, self._yielded = True, False, 0
        self._positions.clear()
        if resume is not None:
            self._steps_before = place.processed if place is not None else 0
            self._skipped, self._seed, self._passes = resume["steps"], resume["seed"], resume["passes"]
            self._begun_from = resume["begun_from"]
            return resume
        self._steps_before = place.fetched if place is not None and place.ready else 0
        self._skipped = 0
        if isinstance(loader, DataLoader):
            self._begun_from = torch.get_rng_state()
            self._seed = mix(next_seed(loader), self._passes)
        self._passes += 1
        return None

    def _skip(self, dataset: Any, iterator: Iterator[Any], own: _OwnRNG | None, resume: Any) -> Iterator[Any]:
        """Reads and drops the samples that were used before, unless the dataset can restore its position."""
        if own is not None:
            iterator = own.around(iterator)
        if resume is None:
            return iterator
        if resume["dataset"] is not None and own is not None and keeps_its_place(dataset):
            state, own_rng = resume["dataset"]
            dataset.load_state_dict(state)
            own.set(own_rng)
            return iterator
        each = 1 if self._by_samples or not self._sharded_here else self._replicas
        for _ in range(self._skipped * each):
            next(iterator, None)
        return iterator

    def _read(self, iterator: Iterator[Any]) -> Any:
        if not self._sharded_here or self._by_samples:
            return next(iterator, _END)
        group = list(islice(iterator, self._replicas))
        return group[self._replica] if len(group) > self._replica else _END

    def _steps(self, iterator: Iterator[Any], dataset: Any, own: _OwnRNG | None, drop_last: bool) -> Iterator[Any]:
        to_the_end = self._predicting or (self._sharded_here and not drop_last)
        keeps = own is not None and keeps_its_place(dataset) and (self._sharded_here or self._replicas == 1)
        while True:
            batch = self._read(iterator)
            counts = self._gather_counts(-1 if batch is _END else agreed_samples(batch) or _UNKNOWN)
            if max(counts) < 0 or (min(counts) < 0 and not to_the_end):
                self._ended = True
                self._warn_of_unread(counts, drop_last)
                return
            batch_weights = self._batch_weights(counts)
            if batch is _END:
                if self._predicting:
                    self._padding_weights = batch_weights
                    return
                batch = self._spare
            self._spare = batch
            self._yielded += 1
            if keeps and own is not None:
                self._positions.append((self._yielded, (dataset.state_dict(), own.get())))
            self.history.append(batch_weights)
            self.sizes.append(self._size)
            self._on_yield(batch_weights)
            yield batch

    def run_padding_steps(self, ahead: bool, limit: float) -> None:
        """Runs prediction steps on padding as long as other replicas have batches.

        Args:
            ahead: Whether Lightning fetches a batch before the previous one has run, as for loaders without length.
                The steps on padding then start after the last own batch has run.
            limit: Largest number of steps; Lightning does not ask for more batches after it.
        """
        batch_weights, self._padding_weights = self._padding_weights, None
        step = self._yielded
        while batch_weights is not None and self._run_padding is not None:
            step += 1
            following = self._gather_counts(-1) if ahead and step < limit else []
            self._run_padding(self._spare, batch_weights)
            if not ahead and step < limit:
                following = self._gather_counts(-1)
            batch_weights = self._batch_weights(following) if following else None

    def _gather_counts(self, count: int) -> list[int]:
        """Returns the samples of every replica in this step, -1 if none are left, `_UNKNOWN`. Collective."""
        if dist.get_world_size() == 1:
            return [count]
        own = torch.tensor([count], device=self._device)
        counts = torch.empty(dist.get_world_size(), dtype=own.dtype, device=self._device)
        dist.all_gather_into_tensor(counts, own)
        by_replica = replicas_of(self._mesh, counts.tolist())
        for number, of_replica in enumerate(by_replica):
            if len(set(of_replica)) > 1:
                raise PartitionError(
                    different_data(self._mesh, f"batches of {sorted(set(of_replica))} samples", number)
                )
        found = [of_replica[0] for of_replica in by_replica]
        self._counts = [n + (c >= 0) for n, c in zip(self._counts, found, strict=True)]
        return found

    def _batch_weights(self, counts: list[int]) -> BatchWeights | None:
        if len(set(counts)) == 1:
            return None
        if _UNKNOWN in counts:
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    "The tensors of a batch have different sizes on dim 0, so its number of samples is not known: the "
                    "batches of all replicas count alike. Set `drop_last=True` if the last ones are smaller."
                )
            return self._batch_weights([1 if c >= 0 else c for c in counts])
        return BatchWeights(counts=tuple(max(0, c) for c in counts), sizes=tuple(max(1, c) for c in counts))

    def _warn_of_unread(self, counts: list[int], drop_last: bool) -> None:
        if max(counts) < 0 or drop_last:
            return
        ended = [r for r, c in enumerate(counts) if c < 0]
        rank_zero_warn(
            f"The replicas have different numbers of batches: replica {', '.join(map(str, ended))} ended after "
            f"{self._counts[ended[0]]}, others have at least {max(self._counts)}. All stop there, and the rest is not "
            "used. Shard the data evenly, or leave it unsharded."
        )

    # ---- lengths and state

    def length(self, loader: Any, own: Callable[[], int]) -> int:
        """Returns the number of steps of a pass, if the stream has a length."""
        if not self._sharded_here:
            return own()
        if self._predicting:
            limit = self._limit
            batches = int(own() * limit) if isinstance(limit, float) else min(own(), limit)
            steps = sharding.steps_of_batches(batches, self._replicas)
            return sharding.length_before_limit(steps, limit) if steps else own()
        if not self._by_samples or loader.batch_size is None:
            return sharding.steps_of_batches(own(), self._replicas)
        samples = len(loader.dataset)
        return sharding.steps_of_samples(samples, loader.batch_size, self._replicas, drop_last=loader.drop_last)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position: the number of steps of the pass that are trained on, and the RNG state of its start."""
        if self._trainer is None or not self._begun:
            return {}
        place = place_in_epoch(self._trainer)
        done = max(0, place.processed - self._steps_before)
        positions = dict(self._positions)
        return {
            "kind": "stream",
            "steps": self._skipped + done,
            "complete": (self._ended and done >= self._yielded)
            or place.processed >= self._trainer.num_training_batches,
            "seed": self._seed,
            "passes": self._passes,
            "begun_from": self._begun_from,
            "dataset": positions.get(done),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next pass continue after the saved steps."""
        if state.get("kind") == "stream" and (state["steps"] or state["complete"]):
            self._resume = dict(state)


class _OwnRNG:
    """Separate RNG state of a dataset that is read in the main process."""

    def __init__(self, seed: int) -> None:
        with preserved_rng():
            seed_all(seed)
            self._state = RNGState.capture()

    def around(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Yields the items of `iterator`, which draws from generators in this state."""
        while True:
            with preserved_rng():
                self._state.restore()
                item = next(iterator, _END)
                self._state = RNGState.capture()
            if item is _END:
                return
            yield item

    def get(self) -> dict[str, Any]:
        """Returns the state in its plain form."""
        return self._state.plain()

    def set(self, plain: dict[str, Any]) -> None:
        """Sets the state from its plain form."""
        self._state = RNGState.from_plain(plain)


def _name(loader: Any) -> str:
    dataset = getattr(loader, "dataset", None)
    return type(loader).__name__ if dataset is None else f"the {type(dataset).__name__} of the {type(loader).__name__}"
