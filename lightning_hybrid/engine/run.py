"""`Run`: objects of one call of `fit`, `validate`, `test` or `predict` that do not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_hybrid._lightning_private import (
    bars_in_files,
    evaluation_loops,
    injects_sampler,
    running_batch,
    sampler_injection,
)
from lightning_hybrid.dataloader.replica import ReplicaData
from lightning_hybrid.dataloader.sharding import BatchWeights
from lightning_hybrid.launch.terminal import LEAF_SPEC, told_if_long
from lightning_hybrid.launch.world import World
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.patching import ignored_warning, patched
from lightning_hybrid.replicas.users_collectives import refused_collectives
from lightning_hybrid.rng.state import agree
from lightning_hybrid.spec.layout import Layout


class Run:
    """The trainer, the connected ranks, the data of this rank's replica, and patches on the trainer. Collective.

    Args:
        trainer: The trainer.
        world: The connected ranks.
        layout: The layout at the start.
        device: This rank's device.
        padding_step: Runs a prediction step on a padding batch, whose result is discarded.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        world: World,
        layout: Layout,
        device: torch.device,
        padding_step: Callable[[Any, BatchWeights], None],
    ) -> None:
        self.trainer, self.world, self.device = trainer, world, device
        self.precision = trainer.precision_plugin
        mesh = Mesh.create(layout, device.type)
        world.limit_waiting()
        agree([])  # so that samplers and initial weights are the same on all ranks
        self.data = ReplicaData(trainer, mesh, device, split=injects_sampler(trainer), run_padding=padding_step)
        self.in_step = 0
        """Larger than 0 in a step."""
        self.gathered_alone: Callable[[torch.Tensor], torch.Tensor] | None = None
        """Set while this rank runs steps on the global batch, as one process does: what `all_gather` returns then."""
        self.may_communicate = True
        """False while the user's steps raise where they call collectives of `torch.distributed` themselves."""
        self.patches = ExitStack()
        """Stack of patches on the trainer, its loops and loggers; closed when the run ends, also after an error."""

    @contextmanager
    def step_context(self, training: bool = False) -> Iterator[None]:
        """Surrounds a step: with the precision of a step, and with rank and world size those of replicas."""
        context = self.precision.train_step_context() if training else self.precision.forward_context()
        self.in_step += 1
        try:
            with context:
                yield
        finally:
            self.in_step -= 1

    @property
    def module(self) -> pl.LightningModule:
        """The LightningModule of the trainer."""
        return self.trainer.lightning_module

    def start(self) -> None:
        """Applies the patches to the trainer that do not depend on the layout."""
        # a sharded module whose first forward pass ran in inference mode (sanity validation) cannot train afterwards
        for loop in evaluation_loops(self.trainer):
            self.patches.enter_context(patched(loop, inference_mode=False))
        self.patches.enter_context(sampler_injection(self.trainer, False))
        # values of a step are reduced over the replicas already, whatever `sync_dist` says
        self.patches.enter_context(ignored_warning(r".*It is recommended to use `self\.log\(.*sync_dist=True\)`.*"))
        self.patches.enter_context(ignored_warning(LEAF_SPEC))
        self.patches.enter_context(bars_in_files())
        if not self.trainer.is_global_zero:
            # what it says of trainer, callbacks and loaders is the same on every rank
            self.patches.enter_context(ignored_warning(module=r"(lightning|pytorch_lightning)\."))
        # `compat.averaging` keeps averages of parts
        self.patches.enter_context(ignored_warning(r".*WeightAveraging doesn't support sharding model layers.*"))
        if torch.distributed.get_world_size() > 1:
            layout, in_step = lambda: self.data.mesh.layout, lambda: self.in_step > 0
            allowed = lambda: self.may_communicate  # noqa: E731 -- as the others
            self.patches.enter_context(refused_collectives(layout, in_step, allowed))
            self.patches.enter_context(self.world.preemption.installed(self.trainer))
            self.patches.enter_context(self.world.stopping.installed(self.trainer))

    def during(self, operation: str) -> AbstractContextManager:
        """Records `operation` and the training batch for the failure monitor."""
        return self.world.monitor.during(operation, running_batch(self.trainer), self.trainer.global_step)

    @contextmanager
    def told(self, operation: str, doing: str) -> Iterator[None]:
        """Does the same as `during`, and says in the terminal what the run is `doing` if it takes long."""
        with self.during(operation), told_if_long(doing):
            yield
