"""Shards map-style datasets: the user's sampler gives the order, and every replica reads its shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_hybrid._lightning_private import (
    place_in_epoch,
    set_epoch,
    set_epoch_length,
    state_left,
)
from lightning_hybrid.dataloader import seeding, sharding
from lightning_hybrid.dataloader.order import Order
from lightning_hybrid.dataloader.sharding import BatchWeights, ByShares, Division, Share
from lightning_hybrid.patching import patched
from lightning_hybrid.rng.state import preserved_generators, preserved_rng
from lightning_hybrid.rng.step import mix

_END: Any = object()

Kind = Literal["samples", "batches", "items"]
"""Unit of sharding: samples, in batches of the loader's size; batches of a batch sampler; items without batches."""


class ShardedSampler:
    """Replaces a loader's batch sampler, or its sampler if it has no batches."""

    def __init__(self, shard: MapShard, sampler: Any, batch_size: int | None, drop_last: bool) -> None:
        self.shard, self.sampler, self.batch_size, self.drop_last = shard, sampler, batch_size, drop_last

    def __iter__(self) -> Iterator[Any]:
        return self.shard.keys()

    def __len__(self) -> int:
        return self.shard.steps_in_all()

    def set_epoch(self, epoch: int) -> None:
        """Calls `set_epoch` of the user's sampler, if it has one."""
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


class MapShard:
    """Shards the samples, batches or items of a map-style loader round-robin over replicas.

    Args:
        source: The user's sampler, or for `batches` the batch sampler.
        kind: Unit of sharding.
        replica: Index of this rank's replica.
        replicas: Number of replicas.
        batch_size: Samples per replica and step.
        drop_last: Whether an incomplete last batch is left out.
        training: The trainer, if its training loop iterates this loader; checkpoints then hold the position.
        limit: For predictions: Lightning's `limit_predict_batches`, which counts batches of a single process.
        run_padding: For predictions: runs a step on a padding batch, whose result is discarded.
        on_yield: Called with the weights of every batch before it is yielded.
        check: Called with the first batch.
    """

    def __init__(
        self,
        source: Any,
        kind: Kind,
        replica: int,
        replicas: int,
        *,
        batch_size: int = 1,
        drop_last: bool = False,
        training: pl.Trainer | None = None,
        limit: int | float | None = None,
        run_padding: Callable[[Any, BatchWeights], None] | None = None,
        on_yield: Callable[[BatchWeights | None], None] = lambda _: None,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        self._source, self._kind, self._replica, self._replicas = source, kind, replica, replicas
        self._batch_size, self._drop_last = batch_size, drop_last
        self.division: Division | None = None
        """Division of global batches among replicas; None: round-robin."""
        self._trainer, self._limit, self._run_padding, self._on_yield = training, limit, run_padding, on_yield
        self._check = check
        self.history: deque[BatchWeights | None] = deque(maxlen=8)
        self.sizes: deque[int | None] = deque(maxlen=8)
        self._pending: deque[tuple[BatchWeights | None, int | None]] = deque()
        self._order = Order(source)
        self._seed = 0
        self._passes = 0
        self._begun = False
        self._first = 0
        """Samples, batches or items of the epoch that were used before this pass."""
        self._steps_before = 0
        """Steps of the epoch before this pass."""
        self._yielded = 0
        """Batches yielded in this pass since the last change of the batch size."""
        self._restart = False
        """True if the remaining batches have to be assembled again."""
        self._resume: dict[str, Any] | None = None
        self._length_changed = self._ended = self._after_epoch = False
        self._owned_at_end: dict[str, Any] | None = None

    # ---- one pass

    def iterate(self, loader: Any, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Returns an iterator over this replica's batches of one pass."""
        self._order.agree(loader)
        self._after_epoch = False
        resume = self._begin_pass(loader)
        if self._after_epoch and loader.persistent_workers:
            self._order.keep_for_workers()
        iterator = self._started(loader, start, kept=resume)
        if self._ended and self._owned_at_end is not None:
            self._order.set_owned(self._owned_at_end)  # starting has drawn from the loader's generator
        return self._batches(iterator, partial(self._restarted, loader, start))

    def _started(self, loader: Any, start: Callable[[], Iterator[Any]], *, kept: bool) -> Iterator[Any]:
        shared = seeding.Seeding()
        parts = {
            "dataset": seeding.SeededSamples(loader.dataset, shared),
            "collate_fn": seeding.SeededCollate(loader.collate_fn, shared),
            "worker_init_fn": seeding.WorkerInit(loader.worker_init_fn),
        }
        # a restart in the middle of an epoch must not draw again
        with preserved_rng() if kept else nullcontext(), patched(loader, **parts):
            return start()

    def _restarted(self, loader: Any, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Returns a new iterator of the same pass, for another batch size."""
        self._restart = False
        with self._order.preserved_generators():
            return self._started(loader, start, kept=True)

    def _begin_pass(self, loader: Any) -> bool:
        resume, self._resume = self._resume, None
        trainer, new_epoch = self._trainer, 0
        place = place_in_epoch(trainer) if trainer is not None else None
        if resume is not None and resume["complete"] and place is not None and place.completed < place.processed:
            self._continue_after_epoch(resume)
            resume, new_epoch = None, 1  # saved at the end of the last batch: Lightning continues with the next epoch
        elif resume is not None and resume["complete"]:
            self._continue_after_epoch(
                resume
            )  # Lightning requests no more batches and starts the next epoch from its beginning
        elif resume is None and trainer is not None:
            self._continue_after_epoch(state_left(trainer, self))
        self._ended = resume is not None and resume["complete"]
        if trainer is not None:
            set_epoch(loader, trainer, new_epoch)
        self._pending.clear()
        self._begun, self._restart, self._order.drawn_from, self._yielded = True, False, None, 0
        if resume is None:
            self._first = 0
            self._steps_before = place.fetched if place is not None and place.ready else 0
            # workers that persist draw no new seed for a pass
            self._seed = mix(next_seed(loader), self._passes)
            self._passes += 1
            if self._length_changed and trainer is not None:
                self._length_changed = False
                set_epoch_length(trainer, self, self.steps_in_all())
            return False
        self._steps_before = place.processed if place is not None else 0
        self._first, self._seed, self._passes = resume["used"], resume["seed"], resume["passes"]
        self._order.drawn_from = resume["drawn_from"]
        return True

    def _continue_after_epoch(self, ended: dict[str, Any] | None) -> None:
        """Continues with the epoch after the one saved in `ended`."""
        if ended and ended["kind"] == self._kind:
            self._after_epoch, self._owned_at_end = True, ended["owned"]
            self._passes = ended["passes"]
            self._order.set_owned(ended["owned"])

    def _batches(self, iterator: Iterator[Any], restarted: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        while True:
            if self._restart:
                iterator = restarted()
            batch = next(iterator, _END)
            if batch is _END:
                return
            if self._check is not None:
                self._check(batch)
                self._check = None
            batch_weights, size = self._pending.popleft()
            if self._run_padding is not None and batch_weights is not None and batch_weights.padding(self._replica):
                self._run_padding(batch, batch_weights)
                return
            self.history.append(batch_weights)
            self.sizes.append(size)
            self._on_yield(batch_weights)
            self._yielded += 1
            yield batch

    # ---- changes of the batch size

    @property
    def can_rebatch(self) -> bool:
        """True if the batch size can change within an epoch."""
        return self._kind == "samples" and self._order.sized and self._trainer is not None

    @property
    def samples(self) -> int:
        """Number of samples per epoch."""
        return len(self._source)

    def rebatch(self, batch_size: int) -> bool:
        """Sets the size of the epoch's remaining batches to `batch_size` samples per replica; keeps the order.

        Returns:
            True if the epoch has such a batch left. Otherwise nothing has changed; see `rebatch_next`.
        """
        whole = self._replicas * self._batch_size
        used = min(self._first + self._yielded * whole, len(self._source)) if self._begun else 0
        if (
            sharding.steps_of_samples(len(self._source) - used, batch_size, self._replicas, drop_last=self._drop_last)
            < 1
        ):
            return False
        self._batch_size = batch_size
        self._forget_shares()
        self._continue_after(used)
        return True

    def _continue_after(self, used: int) -> None:
        trainer: Any = self._trainer
        place = place_in_epoch(trainer)
        self._first, self._yielded = used, 0
        self._steps_before = max(place.fetched, place.processed) if self._begun else 0
        self._pending.clear()
        self._restart = self._length_changed = True
        set_epoch_length(trainer, self, self.steps_in_all())

    @property
    def batch_size(self) -> int:
        """Samples per replica and batch."""
        return self._batch_size

    @property
    def can_reshard(self) -> bool:
        """True if the rest of an epoch can be sharded over other replicas; a different number of them needs samples."""
        return self._order.sized

    def reshard(self, replica: int, replicas: int, batch_size: int, division: Division | None = None) -> None:
        """Shards the rest of the epoch over `replicas` replicas, of which this rank reads for number `replica`.

        Args:
            replica: Index of the replica.
            replicas: Number of replicas.
            batch_size: Samples per replica and batch.
            division: Division of global batches; None: round-robin, or by length if it was so before.
        """
        each = self._batch_size if self._kind == "samples" else 1
        used = min(self._first + self._yielded * self._replicas * each, len(self._source)) if self._begun else 0
        running = self._trainer is not None and self._begun and used < len(self._source)
        self._replica, self._replicas, self._batch_size = replica, replicas, batch_size
        self._forget_shares()
        self.division = division or self.division
        self._length_changed = True
        if running:
            self._continue_after(used)
        elif self._trainer is not None and not self._begun:
            set_epoch_length(self._trainer, self, self.steps_in_all())

    def rebatch_next(self, batch_size: int) -> None:
        """Sets the size of the next epoch's batches to `batch_size` samples per replica."""
        self._batch_size, self._length_changed = batch_size, True
        self._forget_shares()

    def _forget_shares(self) -> None:
        if isinstance(self.division, ByShares):
            self.division = None

    def keys(self) -> Iterator[Any]:
        """Yields the keys of each of this replica's batches; the order is drawn with the first one."""
        if self._ended:
            return
        order = self._order.draw(self._first)
        for share in self._shares(order):
            self._pending.append((share.batch_weights, None if self._kind == "items" else len(share.keys)))
            if self._kind == "items":
                yield seeding.Key(share.keys[0], share.positions[0], self._seed)
            else:
                yield seeding.Keys(share.keys, share.positions, self._seed)

    def _shares(self, order: Any) -> Iterator[Share]:
        place = (self._replica, self._replicas)
        if self._kind == "samples":
            options: dict[str, Any] = {"drop_last": self._drop_last, "first": self._first, "division": self.division}
            return sharding.shard_samples(order, self._batch_size, *place, **options)
        batches = ([key] for key in order) if self._kind == "items" else order
        if self._limit is not None:
            batches = islice(batches, self._cap())
        return sharding.shard_batches(batches, *place, first=self._first)

    # ---- lengths

    def length(self, loader: Any, own: Callable[[], int]) -> int:
        """Returns the length that gives the right number of steps per epoch under Lightning's limit."""
        if self._limit is None:
            return own()
        if self._cap() == 0:
            return len(self._source)  # Lightning raises its own error
        return sharding.length_before_limit(own(), self._limit)

    def _cap(self) -> int | None:
        """Returns the number of batches that the limit allows; None if it allows all."""
        if isinstance(self._limit, float):
            return int(len(self._source) * self._limit) if self._limit < 1.0 else None
        return self._limit

    def steps_in_all(self) -> int:
        """Returns the number of steps of the epoch, including those before a resumption."""
        resumed = self._resume or ({"used": self._first} if self._first else None)
        if resumed is None:
            return self._steps(0)
        before = self._steps_before
        if self._resume is not None and self._trainer is not None:
            before = place_in_epoch(self._trainer).processed
        return before + self._steps(resumed["used"])

    def _steps(self, used: int) -> int:
        count = len(self._source)
        if (cap := self._cap()) is not None:
            count = min(count, cap)
        if self._kind == "samples":
            return sharding.steps_of_samples(count - used, self._batch_size, self._replicas, drop_last=self._drop_last)
        return sharding.steps_of_batches(count - used, self._replicas)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the epoch and the RNG state that its order was drawn from; equal on all ranks."""
        if self._trainer is None or not self._begun:
            return {}
        place = place_in_epoch(self._trainer)
        steps = max(0, place.processed - self._steps_before)
        used = self._first + steps * self._replicas * (self._batch_size if self._kind == "samples" else 1)
        complete = self._first + steps > 0 and place.processed >= self._trainer.num_training_batches
        if self._order.sized:
            used = min(used, len(self._source))
            complete = complete or self._steps(used) <= 0
        return {
            "kind": self._kind,
            "used": used,
            "complete": complete,
            "seed": self._seed,
            "passes": self._passes,
            "drawn_from": self._order.drawn_from,
            "owned": self._order.owned(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next pass continue after the samples that were trained on, without reading them.

        Raises:
            ValueError: If the state is that of a loader of another kind.
        """
        if not state or (state.get("drawn_from") is None and not self._order.sequential):
            return  # saved before the first batch
        if state.get("kind") != self._kind:
            raise ValueError(
                f"The training loader is sharded by {self._kind}, but the checkpoint has the position of a loader "
                f"sharded by {state.get('kind')}. Resume with a loader like the one that was saved."
            )
        self._resume = {**state, "used": int(state["used"])}
        if self._order.sized and self._trainer is not None and not state["complete"]:
            length = self.steps_in_all()
            if length != self._steps(0):  # the global batch size has changed
                self._length_changed = True
                set_epoch_length(self._trainer, self, length)


def next_seed(loader: Any) -> int:
    """Returns the seed that the loader draws next for its workers, without drawing it."""
    generator = loader.generator
    with preserved_rng(), preserved_generators([] if generator is None else [generator]):
        return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
