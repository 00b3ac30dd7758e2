"""`Engine`: the objects that exist once per layout, and all patches that depend on the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._lightning_private import is_overridden
from lightning_hybrid._torch_private import whole_scalars
from lightning_hybrid.collectives import to_full
from lightning_hybrid.engine.first_batch import Sample
from lightning_hybrid.engine.hook_view import HookView
from lightning_hybrid.engine.optimizer import OptimizerWrapper
from lightning_hybrid.engine.run import Run
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.engine.user_clipping import clipping_of_parts
from lightning_hybrid.ghosts.deferred_init import DeferredInit
from lightning_hybrid.ghosts.ghost import ghosts_not_assigned
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.hook_logs import HookLogs
from lightning_hybrid.metrics.step_logs import seen_before_step
from lightning_hybrid.metrics.torchmetrics import Metrics
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.plan import check_precision, check_trainer, make_partition
from lightning_hybrid.parallelize.whole import Refusals, WholeModule, needs_whole_weights
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas.diloco import DiLoCo
from lightning_hybrid.replicas.reducer import seen_after_backward
from lightning_hybrid.rng.step import StepRNG
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.plan import Plan
from lightning_hybrid.spec.request import Request


class Listener(Protocol):
    """Follows changes of the layout; see `HybridStrategy.listeners`."""

    def check_layout(self, request: Request) -> None:
        """Raises if this listener cannot follow the layout of `request`; called on all ranks before any change.

        Raises:
            PartitionError: If this listener cannot follow the layout.
        """
        ...

    def layout_changed(self, engine: Engine) -> None:
        """Follows the new layout, or a new placement of blocks and experts in the same layout. Called on all ranks."""
        ...


class Engine:
    """The partitioned module and everything that runs, measures and patches it under one layout.

    Args:
        run: The trainer, device and options, which do not depend on the layout.
        request: The layout and its options.
        partition: The applied partition.
    """

    def __init__(self, run: Run, request: Request, partition: Partition) -> None:
        self.request, self.partition = request, partition
        self.root = run.module
        self.mesh: Mesh = partition.mesh
        self.device = run.device
        self.rng = StepRNG(run.device, self.mesh.replica, self.mesh.rank("tp"))
        self.metrics = Metrics(self.root, self.mesh, run.device)
        self.hook_logs = HookLogs(self.root, self.mesh, run.device)
        self.runner = StepRunner(partition, run, request.microbatches, self.rng, self.metrics)
        self.optimizers = OptimizerWrapper(self.runner, request.on_nonfinite)
        partition.interceptor.rng = self.rng
        if partition.tensor is not None:
            partition.tensor.use_rng(self.rng)
        for reader in (partition, self.metrics, self.hook_logs):
            reader.padding = lambda: self.runner.padding
        self.metrics.factor = lambda: self.runner.mean_factor
        self.metrics.in_step = lambda: run.in_step > 0
        self.hook_logs.samples_in = lambda step: self.runner.samples[step]
        self.metrics.announce = self.hook_logs.announce = self.runner.announce
        partition.alone = lambda: self.runner.predicts
        partition.on_remove = self.runner.gradients.release
        self.hook_view: HookView | None = None
        """Of the hook of the user that runs at present."""
        self.full_tensor: Callable[[Tensor], Tensor] = to_full
        """Returns the whole of a DTensor that code of the user has kept, in the order of the model. Collective."""
        self.whole = WholeModule(partition)
        self.refusals = Refusals(self.root, partition.plan.layout)
        self.is_running = self.is_removed = False
        self._loads_read: dict[object, Any] = {}
        """Tokens of all experts at the last reading, by reader."""
        self.patches = ExitStack()
        """Stack that removes all patches when it is closed; higher layers add the patches that depend on the layout."""

    @staticmethod
    def plan_partition(run: Run, request: Request, mesh: Mesh, sample: Sample) -> Partition:
        """Decides how the module is partitioned. Has no effect that other ranks could observe.

        Args:
            run: The trainer, device and options, which do not depend on the layout.
            request: The layout and its options.
            mesh: The mesh of the layout.
            sample: Returns the name of the first step and the arguments of that step.

        Raises:
            PartitionError: If the layout does not suit the module or the trainer.
        """
        check_precision(run.precision)
        check_trainer(request.layout, run.trainer)
        return make_partition(run.module, request, mesh, run.device, run.step_context, sample)

    @classmethod
    def build(cls, run: Run, request: Request, partition: Partition, weights: DeferredInit | None) -> Engine:
        """Applies a planned partition. Collective.

        Args:
            run: The trainer, device and options, which do not depend on the layout.
            request: The layout and its options.
            partition: The result of `plan_partition`, which all ranks have called.
            weights: Recorded initialization of parameters that are still ghosts; None: all parameters are real.
        """
        partition.apply(run.device, weights)
        return cls(run, request, partition)

    @property
    def run(self) -> Run:
        """The present run; a later run of the same module and strategy uses the same engine."""
        return self.runner.run

    @property
    def plan(self) -> Plan:
        """The plan of the partition."""
        return self.partition.plan

    @property
    def diloco(self) -> DiLoCo | None:
        """The outer optimizer if replicas step independently, otherwise None."""
        return self.runner.gradients.diloco

    # ---- patches

    def start(self) -> None:
        """Patches the precision plugin, the logging of the module, and torchmetrics. Collective."""
        trainer, any_rank = self.run.trainer, self.run.world.any_rank
        # votes come first: where a rank has failed in what follows, the others would wait for its vote
        self.runner.gradients.seen_by_hooks = any_rank(seen_after_backward(trainer))
        self.runner.gradients.users_backward = is_overridden("backward", self.run.module)
        self.optimizers.logs_wait = not any_rank(seen_before_step(trainer))
        self.stop()
        self.runner.loss_weights.reset()
        self.partition.resume()
        self.patches.callback(self.partition.suspend)
        self.is_running = True
        self.runner.gradients.resume()
        self.patches.callback(self.runner.gradients.release)
        self.patches.enter_context(patched(self.run.data, announce=self.runner.announce))
        self.patches.enter_context(clipping_of_parts(self.partition, self.device))
        self.patches.enter_context(whole_scalars())
        if self.plan.layout.pp > 1:
            self.patches.enter_context(ghosts_not_assigned())
        for part in (self.hook_logs, self.metrics, self.optimizers):
            part.install()
            self.patches.callback(part.remove)

    def stop(self) -> None:
        """Removes all patches; the module stays partitioned."""
        self.patches.close()
        self.is_running = False

    @contextmanager
    def outside_hooks(self) -> Iterator[None]:
        """Runs a step, or code of this package, as if no hook of the user had called it."""
        view = self.hook_view
        with nullcontext() if view is None else view.left(), patched(self, hook_view=None):
            yield

    # ---- the module between runs

    def keep(self, **attributes: object) -> None:
        """Sets attributes of the module that it keeps after a run, as long as its weights are divided."""
        self.whole.attributes.update(attributes)
        self.root.__dict__.update(attributes)

    def end_run(self, *, failed: bool) -> None:
        """Shows the module whole if the weights fit on every rank, and otherwise refuses uses that need whole weights.

        Args:
            failed: Whether the run has ended by an exception; if not, this is collective.
        """
        if not self.divides_weights or self.whole.is_shown or self.is_removed:
            return
        if failed or self.run.world.any_rank(not self.whole.fits(self.device, self.run.trainer.num_devices)):
            self.refusals.install()
        else:
            self.whole.show()

    def begin_run(self, run: Run) -> bool:
        """Divides a shown module again; returns False if its parameters are others since. Collective."""
        self.refusals.remove()
        if self.whole.is_shown:
            if run.world.any_rank(self.whole.is_changed()):
                return False
            self.whole.agree(self.device)
            self.whole.divide(self.device)
        self.runner.run = run
        return True

    def remove(self) -> None:
        """Removes the partition, so that every rank has the user's module with whole weights. Collective."""
        self.stop()
        self.refusals.remove()
        wholes = self.whole.set_back() if self.whole.is_shown else None
        for key in self.whole.attributes:
            self.root.__dict__.pop(key, None)
        self.partition.remove(wholes)
        self.is_removed = True

    @contextmanager
    def divided(self) -> Iterator[None]:
        """Divides the weights of a shown module, and lifts refusals, for the duration of the context."""
        with self.outside_hooks(), self.refusals.lifted(), self.whole.divided(self.device):
            yield

    @contextmanager
    def shown_whole(self) -> Iterator[None]:
        """Shows the module whole for the duration of the context. Collective over all ranks.

        Raises:
            PartitionError: If the user has added, removed or replaced parameters.
        """
        if self.whole.is_shown or not self.divides_weights:
            yield
            return
        with self.outside_hooks():
            yield from self._shown_whole()

    def _shown_whole(self) -> Iterator[None]:
        if self.is_running:
            self.partition.pause()
            self.runner.gradients.release()
        try:
            with self.refusals.lifted():
                self.whole.show()
                try:
                    yield
                finally:
                    changed = self.run.world.any_rank(self.whole.is_changed())
                    if changed:
                        self.whole.set_back()
                    else:
                        self.whole.agree(self.device)
                        self.whole.divide(self.device)
        finally:
            if self.is_running:
                self.partition.resume()
                self.runner.gradients.resume()
        if changed:
            raise PartitionError(
                "Parameters were added, removed or replaced within `strategy.whole(module)`, and optimizers and layout "
                "are those of the others. Use `strategy.relayout(..., edit=)` in a run, or change the module after it."
            )

    @property
    def divides_weights(self) -> bool:
        """True if each rank holds only a part of the weights."""
        return self.plan.layout.devices != self.plan.layout.dp

    def __deepcopy__(self, memo: dict) -> None:
        """Returns None, so that a copy of the module has no engine.

        Raises:
            PartitionError: If each rank holds only a part of the weights.
        """
        if self.divides_weights and not self.whole.is_shown:
            raise needs_whole_weights(self.plan.layout, "a copy")

    def __reduce__(self) -> tuple[type, tuple]:
        """Replaces the engine of a pickled module by None.

        Raises:
            PartitionError: If each rank holds only a part of the weights.
        """
        self.__deepcopy__({})
        return type(None), ()

    # ---- experts

    def expert_loads(self, reader: object = None) -> dict[str, Tensor]:
        """Returns the tokens that each expert received in training, by module. Collective.

        Args:
            reader: Any object: tokens since the last call with the same one, in this layout, are counted.
        """
        experts = self.partition.experts
        if experts is None:
            return {}
        taken = experts.loads()
        loads = {
            name: taken.get(name, torch.zeros(plan.experts, dtype=torch.long, device=self.device))
            for name, plan in experts.plans.items()
        }
        together = torch.cat(list(loads.values()))
        dist.all_reduce(together)
        together //= self.mesh.layout.tp  # ranks of `tp` have sent the same tokens
        before, self._loads_read[reader] = self._loads_read.get(reader, 0), together
        since = (together - before).split([plan.experts for plan in experts.plans.values()])
        return dict(zip(loads, since, strict=True))
