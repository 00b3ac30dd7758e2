"""Gives each rank the data of its replica. The global batches of every layout are those of a single process.

`MapShard` shards map-style datasets, `StreamShard` loaders without a sampler; `CheckedShard` leaves a loader unchanged.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import has_iterable_dataset
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_hybrid._lightning_private import (
    batches_left_in_window,
    behind_index_batches,
    hands_out_its_iterator,
    loaders_of_running_batch,
    prediction_loaders,
    predictions_of,
    prefetches,
    recorded_indices,
    reload_validation,
    training_loaders,
)
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.dataloader import sharding
from lightning_hybrid.dataloader.agreement import (
    SEEDED,
    CheckedShard,
    all_read_the_same,
    check_dataset,
    digest,
)
from lightning_hybrid.dataloader.map_shard import MapShard, ShardedSampler
from lightning_hybrid.dataloader.sharding import BatchWeights, ByShares, Division
from lightning_hybrid.dataloader.stream_shard import StreamShard
from lightning_hybrid.dataloader.wrap import BatchStream, ResumableStream, keeps_its_place, sharded_loader, users_loader
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.spec.errors import PartitionError


class ReplicaData:
    """Shards the trainer's loaders and reads the data of this rank's replica.

    Args:
        trainer: The trainer.
        mesh: The mesh.
        device: This rank's device, for collectives.
        split: Whether data are sharded over the replicas (`use_distributed_sampler`).
        run_padding: Runs a prediction step on a padding batch, whose result is discarded.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        mesh: Mesh,
        device: torch.device,
        *,
        split: bool,
        run_padding: Callable[[Any, BatchWeights], None],
    ) -> None:
        self._trainer, self.mesh, self._device, self._split = trainer, mesh, device, split
        self._run_padding = run_padding
        self.announce: Callable[[str], object] = lambda what: None
        """Called before a collective with what this replica does: the others may not do it."""
        self._recent_weights: deque[BatchWeights | None] = deque(maxlen=16)
        """Weights of the last batches of all loaders."""
        self._any_uneven = False
        self._left_in_step = self._tokens_in_step = 0

    # ---- loaders

    def process(self, loader: object) -> object:
        """Returns the loader as this rank iterates it. Collective over all ranks."""
        loader = users_loader(loader)
        if isinstance(loader, DataLoader):
            return self._data_loader(loader)
        if not self._split and self.mesh.layout.devices == self.mesh.layout.replicas:
            return loader
        shard = self._stream(loader) if self._split else CheckedShard(self.mesh, self._note)
        resumes = self._training is not None and (self._split or keeps_its_place(loader))
        return (ResumableStream if resumes else BatchStream)(loader, shard, self._announce)

    def _data_loader(self, loader: DataLoader) -> DataLoader:
        parts: dict[str, Any] = {}
        if loader.worker_init_fn is None and int(os.environ.get("PL_SEED_WORKERS", "0")):
            # Lightning would seed per rank; the ranks of a replica must read the same data
            parts["worker_init_fn"] = partial(pl_worker_init_function, rank=self.mesh.replica)
        if not self._split or _is_distributed(loader):
            return sharded_loader(loader, CheckedShard(self.mesh, self._note), self._announce, resumable=False, **parts)
        resumes = self._training is not None and not keeps_its_place(loader)
        if has_iterable_dataset(loader):
            return sharded_loader(loader, self._stream(loader), self._announce, resumable=resumes, **parts)
        shard, own = self._samples(loader)
        return sharded_loader(loader, shard, self._announce, resumable=resumes, **own, **parts)

    def _announce(self, what: str) -> None:
        self.announce(what)

    @property
    def _predicting(self) -> bool:
        return self._trainer.state.fn == TrainerFn.PREDICTING

    @property
    def _training(self) -> pl.Trainer | None:
        """The trainer while it sets up its training loader, otherwise None."""
        fitting = self._trainer.state.fn == TrainerFn.FITTING
        return self._trainer if fitting and self._trainer.training else None

    def _stream(self, loader: Any) -> StreamShard:
        return StreamShard(
            loader,
            self.mesh,
            self._device,
            training=self._training,
            predicting=self._predicting,
            limit=self._trainer.limit_predict_batches,
            run_padding=self._run_padding if self._predicting else None,
            on_yield=self._note,
        )

    def _samples(self, loader: DataLoader) -> tuple[MapShard, dict[str, Any]]:
        batches: Any = behind_index_batches(loader.batch_sampler)
        standard = type(batches) is BatchSampler and not self._predicting
        check_dataset(loader.dataset, self.mesh)
        check = self._check_first if self.mesh.layout.devices > self.mesh.layout.replicas else None
        options: dict[str, Any] = {"training": self._training, "on_yield": self._note, "check": check}
        if self._predicting:
            options |= {"limit": self._trainer.limit_predict_batches, "run_padding": self._run_padding}
        place = (self.mesh.replica, self.mesh.layout.replicas)
        if batches is None:
            shard = MapShard(loader.sampler, "items", *place, **options)
            return shard, {"sampler": ShardedSampler(shard, loader.sampler, None, False)}
        if standard:
            options |= {"batch_size": batches.batch_size, "drop_last": batches.drop_last}
        shard = MapShard(
            batches.sampler if standard else batches, "samples" if standard else "batches", *place, **options
        )
        sampler = ShardedSampler(
            shard,
            getattr(batches, "sampler", None),
            getattr(batches, "batch_size", loader.batch_size),
            getattr(batches, "drop_last", loader.drop_last),
        )
        return shard, {"batch_sampler": recorded_indices(self._trainer, sampler) if self._predicting else sampler}

    def _check_first(self, batch: Any) -> None:
        all_read_the_same(digest(batch), self.mesh, SEEDED)

    # ---- the running step

    def _note(self, batch_weights: BatchWeights | None) -> None:
        self._recent_weights.append(batch_weights)
        if batch_weights is not None:
            self._any_uneven = True
            if hands_out_its_iterator(self._trainer):
                raise PartitionError(
                    "The step takes an iterator (`dataloader_iter`), so a batch of which the replicas have different "
                    f"numbers of samples, {batch_weights.counts}, or of tokens, cannot be weighted. "
                    "Set `drop_last=True`, or give the step an argument `batch`."
                )

    def batch_weights(self) -> BatchWeights | None:
        """Returns the weights of the batch that the trainer is about to run a step on; None if it is not weighted."""
        if not self._any_uneven:
            return None
        loaders, ahead = loaders_of_running_batch(self._trainer)
        if loaders is None:
            return self._recent_weights[-1 - ahead]
        histories = [loader.replica_shard.history for loader in loaders if hasattr(loader, "replica_shard")]
        found = [history[-1 - ahead] for history in histories if len(history) > ahead]
        if len(found) < 2 or all(u is None for u in found):
            return found[0] if found else None
        if any(u is not None and u.tokens is not None for u in found):
            raise PartitionError(
                "Several training loaders are read together, and one of them has batches with `lengths`. Its tokens "
                "cannot weight the samples of the others. Use one loader, or batches without `lengths`."
            )
        rank_zero_warn(
            "Several training loaders are read together, and one of them is used up within a global batch. The batch "
            "is weighted by the samples of all loaders."
        )
        sizes = [getattr(loader, "batch_size", None) for loader in loaders if hasattr(loader, "replica_shard")]
        if any(u is None and n is None for u, n in zip(found, sizes, strict=True)):
            raise PartitionError(
                "Several training loaders are read together. One of them is used up within a global batch, and another "
                "has no `batch_size`, so the batch cannot be weighted. Set `drop_last=True`, or give a `batch_size`."
            )
        replicas = self.mesh.layout.replicas
        return sharding.added([u or sharding.even(replicas, n or 1) for u, n in zip(found, sizes, strict=True)])

    def batch_samples(self) -> int | None:
        """Returns the number of samples read for the batch that the trainer is about to run; None if not known."""
        loaders, ahead = loaders_of_running_batch(self._trainer)
        shards = [getattr(loader, "replica_shard", None) for loader in loaders or ()]
        found = {shard.sizes[-1 - ahead] for shard in shards if shard is not None and len(shard.sizes) > ahead}
        return found.pop() if len(found) == 1 and None not in shards else None

    def share_in_step(self, batch_weights: BatchWeights | None) -> float:
        """Returns the factor on the loss of the next training batch, among the accumulated batches of a step.

        The factor is 1 if batches are not weighted by tokens: Lightning averages over accumulated batches. Must be
        called for every training batch.
        """
        if batch_weights is None or batch_weights.tokens is None:
            return 1.0
        tokens = batch_weights.tokens
        if self._left_in_step == 0:
            self._left_in_step = batches_left_in_window(self._trainer)
            self._tokens_in_step = sum(tokens.totals[tokens.number : tokens.number + self._left_in_step])
        self._left_in_step -= 1
        return tokens.share(self._trainer.accumulate_grad_batches, self._tokens_in_step)

    # ---- changes of the layout

    def check_layout(self, mesh: Mesh) -> None:
        """Checks that the rest of the epoch can be sharded over the replicas of another mesh.

        Raises:
            PartitionError: If it cannot.
        """
        if mesh.replica_of_ranks == self.mesh.replica_of_ranks:
            return
        change = f"`layout='{mesh.layout}'`"
        for loader in training_loaders(self._trainer).flattened:
            shard = getattr(loader, "replica_shard", None)
            if not isinstance(shard, MapShard) or not shard.can_reshard:
                raise PartitionError(
                    f"{change} shards the data over other replicas. That is not possible for a "
                    f"{type(users_loader(loader)).__name__} without a sampler that has a length, or with a distributed "
                    "sampler. Use a map-style dataset, or a layout with the same replicas on the same ranks."
                )
            if mesh.layout.replicas == self.mesh.layout.replicas:
                continue
            if not shard.can_rebatch:
                raise PartitionError(
                    f"{change} has {mesh.layout.replicas} replicas instead of {self.mesh.layout.replicas}, and the "
                    "batches of a batch sampler cannot be made larger or smaller, so the global batch would change. "
                    "Give the DataLoader a `batch_size`, or use a layout with as many replicas."
                )
            whole = shard.batch_size * self.mesh.layout.replicas
            if whole % mesh.layout.replicas:
                raise PartitionError(
                    f"{change}: a batch of {whole} samples cannot be shared by {mesh.layout.replicas} replicas. Use a "
                    "`batch_size` that all layouts of the run can share, or another layout."
                )

    def batch_size_under(self, mesh: Mesh) -> int | None:
        """Returns the samples per replica and batch under `mesh` for the same global batch; None if sizes are fixed."""
        shard = getattr(training_loaders(self._trainer).flattened[0], "replica_shard", None)
        if not isinstance(shard, MapShard) or not shard.can_rebatch:
            return None
        return shard.batch_size * self.mesh.layout.replicas // mesh.layout.replicas

    def follow_layout(self, mesh: Mesh) -> None:
        """Shards the rest of the epoch over the replicas of `mesh`; training continues after the last batch."""
        before, self.mesh = self.mesh, mesh
        self._left_in_step = 0
        if mesh.replica_of_ranks == before.replica_of_ranks:
            return
        for loader in training_loaders(self._trainer).flattened:
            size = loader.replica_shard.batch_size * before.layout.replicas // mesh.layout.replicas
            loader.replica_shard.reshard(mesh.replica, mesh.layout.replicas, size)
        reload_validation(self._trainer)

    @property
    def can_share(self) -> bool:
        """True if replicas can have different numbers of samples of a batch."""
        shards = [getattr(loader, "replica_shard", None) for loader in training_loaders(self._trainer).flattened]
        return len(shards) == 1 and isinstance(shards[0], MapShard) and shards[0].can_rebatch

    @property
    def global_batch_size(self) -> int:
        """Samples of all replicas in a batch; needs `can_share`."""
        return training_loaders(self._trainer).flattened[0].replica_shard.batch_size * self.mesh.layout.replicas

    @property
    def shares(self) -> tuple[int, ...]:
        """Samples of each replica in a batch; needs `can_share`."""
        shard = training_loaders(self._trainer).flattened[0].replica_shard
        if isinstance(shard.division, ByShares):
            return shard.division.shares
        return (shard.batch_size,) * self.mesh.layout.replicas

    def share(self, shares: tuple[int, ...]) -> None:
        """Gives replica r `shares[r]` samples of each global batch, from the next batch on.

        Must be called between two batches, with equal arguments on all ranks.

        Raises:
            ValueError: If `shares` do not add up to the global batch size.
        """
        if sum(shares) != self.global_batch_size:
            raise ValueError(f"`shares` must add up to {self.global_batch_size}. Got {shares}.")
        self.divide(ByShares(shares=shares))

    def divide(self, division: Division) -> None:
        """Divides global batches by `division`, from the next one on; called between two batches, on all ranks."""
        shard = training_loaders(self._trainer).flattened[0].replica_shard
        shard.reshard(self.mesh.replica, self.mesh.layout.replicas, shard.batch_size, division)

    # ---- predictions

    def numbered(self, args: tuple) -> tuple:
        """Returns the arguments of `predict_step`, with the batch index that a single process would have."""
        step = self._trainer.lightning_module.predict_step
        if not is_param_in_hook_signature(step, "batch_idx", min_args=2):
            return args
        if not all(self._is_sharded(loader) for loader in prediction_loaders(self._trainer)):
            return args
        batch, number, *rest = args
        return (batch, number * self.mesh.layout.replicas + self.mesh.replica, *rest)

    def check_predictions(self) -> None:
        """Checks the loaders before predictions.

        Raises:
            PartitionError: If one of several loaders has no sampler.
        """
        loaders = prediction_loaders(self._trainer)
        streamed = [x for x in loaders if isinstance(getattr(x, "replica_shard", None), StreamShard)]
        if streamed and len(loaders) > 1 and self.mesh.layout.replicas > 1:
            raise PartitionError(
                f"`layout='{self.mesh.layout}'`: {len(loaders)} loaders are predicted on, among them one without a "
                "sampler, which replicas may end at different times. Call `trainer.predict` once for each loader."
            )

    def run_padding_steps(self) -> None:
        """Runs steps on padding while other replicas have batches and this one has none left."""
        for loader, limit in zip(
            prediction_loaders(self._trainer), self._trainer.predict_loop.max_batches, strict=True
        ):
            if isinstance(getattr(loader, "replica_shard", None), StreamShard):
                loader.replica_shard.run_padding_steps(prefetches(self._trainer), limit)

    def finish_predictions(self) -> None:
        """Gathers the predictions of all replicas on every rank, in the order of a single process. Collective.

        Fills the trainer's lists in place, after all hooks have run on this rank's own predictions.
        """
        self.run_padding_steps()
        own, loaders = predictions_of(self._trainer), prediction_loaders(self._trainer)
        replicas = self.mesh.layout.replicas
        if own is None or replicas == 1 or not all(self._is_sharded(loader) for loader in loaders):
            return
        gathered = gather_objects(own, self.mesh.replica_group)
        for number, mine in enumerate(own):
            parts = [of_replica[number] for of_replica in gathered]
            steps = max(len(part) for part in parts)
            mine[:] = [part[step] for step in range(steps) for part in parts if step < len(part)]

    def _is_sharded(self, loader: Any) -> bool:
        return isinstance(getattr(loader, "replica_shard", None), MapShard | StreamShard)


def _is_distributed(loader: DataLoader) -> bool:
    samplers_used = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers_used)
