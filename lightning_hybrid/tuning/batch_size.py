"""Changes the size of training batches during training, between two steps of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lightning_hybrid._lightning_private import begin_window, end_windows, training_loaders
from lightning_hybrid.adapt.division import BatchDivision, DivisionLimits
from lightning_hybrid.batches import count_samples
from lightning_hybrid.dataloader.map_shard import MapShard
from lightning_hybrid.dataloader.peek import sample_batch
from lightning_hybrid.device_memory import allocation_retries, device_name
from lightning_hybrid.engine.engine import Engine, Listener
from lightning_hybrid.engine.gradient_noise import GradientNoise
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.request import Request
from lightning_hybrid.spec.stages import choose_microbatches, divides_into
from lightning_hybrid.tuning.memory_probe.probe import MemoryProbe, ProbeResult
from lightning_hybrid.tuning.token_budget import TokenBudget

MICROBATCHES_PER_RANK = 8
"""Maximum number of microbatches of a batch per pipeline rank, if memory does not grow with the number: gives a bubble
of a ninth (see `spec.stages.bubble`) and keeps batches small."""
_NO_NOISE = (
    "`statistics` compares the gradients of replicas with their mean, which `gradient_sync='diloco'` does not take. "
    "Set `statistics=None`, or use another `gradient_sync`."
)


class BatchSizePolicy(Protocol):
    """Policy that decides batch sizes, called when the layout changes."""

    def division_under(self, request: Request) -> BatchDivision:
        """Returns the division of the current global batch in the layout of `request`.

        Raises:
            PartitionError: If the global batch cannot be divided.
        """
        ...

    def layout_changed(self) -> None:
        """Discards the measurements of the previous layout."""
        ...


class BatchSizeController:
    """Changes the division of global batches, and keeps gradients, learning-rate schedules and data order correct.

    Args:
        engine: The engine of the running fit, whose training loaders are set up.
        policy: Decides the division after a change of layout; None: batches keep their division.
    """

    def __init__(self, engine: Engine, policy: BatchSizePolicy | None = None) -> None:
        self._engine, self._policy = engine, policy
        self._listeners: list[Listener] = []
        trainer, runner = engine.run.trainer, engine.runner
        self._trainer = trainer
        self._loader = training_loaders(trainer).flattened[0]
        self._flow = self._find_flow()
        self.budget = TokenBudget.of(trainer, runner, self._loader)
        """Token budget of the loader's batches: sizes are in tokens; None: sizes are in samples."""
        self._next_budget: int | None = None
        self._accumulate = trainer.accumulate_grad_batches
        self._microbatches = runner.microbatches
        self.division = self.first = self._present()
        self._running, self._left = self.division, 0
        self._due, self._waits = True, False
        self._retries = allocation_retries(runner.device) or 0
        self.noise: GradientNoise | None = None
        self.measures = True
        """True if the next step is measured."""

    @classmethod
    def start(
        cls, engine: Engine, listeners: list[Listener], policy: BatchSizePolicy | None = None
    ) -> BatchSizeController:
        """Returns a controller that follows changes of the layout until `release`, or the end of the run.

        Args:
            engine: The engine of the running fit, from `on_train_start` on.
            listeners: The listeners of the strategy.
            policy: Decides how batches are divided after a change of layout.
        """
        control = cls(engine, policy)
        control._listeners = listeners
        listeners.append(control)
        if control.budget is not None:
            engine.run.patches.enter_context(control.budget.preserved())
        engine.run.patches.callback(control.release)
        return control

    @property
    def _runner(self) -> StepRunner:
        return self._engine.runner

    # ---- another layout

    def first_under(self, request: Request) -> BatchDivision:
        """Returns the division that the first global batch would have had in the layout of `request`."""
        layout, count = request.layout, 1
        if self.budget is not None or layout == self._engine.request.layout:
            return self.first
        size = self.first.batch_size * self.replicas // layout.replicas
        if layout.pp > 1 and not self._runner.one_microbatch:
            count = choose_microbatches(size, request.microbatches, layout.pp, request.schedule)
        return replace(self.first, batch_size=size, microbatches=count)

    def check_layout(self, request: Request) -> None:
        """Raises if batches cannot be divided in the layout of `request`.

        Raises:
            PartitionError: If batches cannot be divided, or the gradient noise cannot be measured.
        """
        if request.gradient_sync.kind == "diloco" and self.noise is not None:
            raise PartitionError(_NO_NOISE)
        if self._policy is not None:
            self._policy.division_under(request)

    def layout_changed(self, engine: Engine) -> None:
        """Divides the current global batch in the new layout, which data and optimizers have already."""
        stays = engine.request.layout == self._engine.request.layout
        first = None if stays else self.first_under(engine.request)
        self._engine = engine
        if self.noise is not None:
            self.noise = None
            self.measure_noise()
        self._microbatches, self._due = self._runner.microbatches, True
        if self.budget is not None:
            self.budget = TokenBudget.of(self._trainer, self._runner, self._loader)
        if first is None:
            return
        self.first = first
        if self.budget is None:
            size = first.batch_size if self._flow is None else self._flow.batch_size
            self.division = replace(self.division, batch_size=size, microbatches=self._runner.microbatches_of(size))
        if self._policy is not None:
            self.change(self._policy.division_under(self.request))
            self._policy.layout_changed()

    def _find_flow(self) -> MapShard | None:
        loaders = training_loaders(self._trainer).flattened
        if len(loaders) > 1 or isinstance(self._trainer.limit_train_batches, int):
            return None
        flow = getattr(loaders[0], "replica_shard", None)
        return flow if isinstance(flow, MapShard) and flow.can_rebatch else None

    def _present(self) -> BatchDivision:
        sampler = getattr(self._loader, "batch_sampler", None)
        size = getattr(self._loader, "batch_size", None) or getattr(sampler, "batch_size", None)
        if self._flow is not None:
            size = self._flow.batch_size
        if self.budget is not None:
            return BatchDivision(batch_size=self.budget.tokens, accumulate=self._accumulate, microbatches=1)
        if not size:
            raise PartitionError(
                "`AdaptiveBatchSize` needs a training loader with a `batch_size`. Got a "
                f"{type(self._loader).__name__} without one. Give the DataLoader a `batch_size`, or remove the "
                "callback."
            )
        count = self._runner.microbatches_of(size)
        return BatchDivision(batch_size=size, accumulate=self._accumulate, microbatches=count)

    # ---- current state

    @property
    def request(self) -> Request:
        """The current layout and its options."""
        return self._engine.request

    @property
    def measured_on(self) -> str:
        """Layout and device of measured times and memory."""
        return f"{self._engine.request.layout} on {device_name(self._runner.device)}"

    @property
    def replicas(self) -> int:
        """Number of replicas that share a global batch."""
        return self._runner.mesh.layout.replicas

    @property
    def global_batch_size(self) -> int:
        """Number of samples of all replicas per step of the optimizer."""
        return self.replicas * self.division.per_replica

    @property
    def can_rebatch(self) -> bool:
        """True if the loader's batches can have another size; otherwise only their number per step changes."""
        return self._flow is not None

    @property
    def epoch_samples(self) -> int | None:
        """Number of samples of an epoch; None if unknown."""
        return self._flow.samples if self._flow is not None else None

    def limits(self, microbatch_size: int, min_parts: int, request: Request | None = None) -> DivisionLimits:
        """Returns the limits of a division of a global batch.

        Args:
            microbatch_size: The largest microbatch, in samples.
            min_parts: Minimum number of parts with separate gradients per step.
            request: The layout and its options; None: the current ones.
        """
        request = request or self.request
        first, ranks, schedule = self.first_under(request), request.layout.pp, request.schedule
        count = first.microbatches
        if ranks > 1 and not self._runner.one_microbatch and schedule != "GPipe":  # GPipe stores all microbatches
            count = max(count, MICROBATCHES_PER_RANK * ranks)
        return DivisionLimits(
            replicas=request.layout.replicas,
            microbatch_size=microbatch_size,
            max_microbatches=count,
            runs=lambda parts: divides_into(schedule, ranks, parts),
            batch_size=None if self.can_rebatch else first.batch_size,
            min_parts=min_parts,
        )

    # ---- memory

    def find_microbatch(self, sizes: Sequence[int], budget_bytes: int | None) -> ProbeResult:
        """Finds the largest microbatch that fits into the memory of all ranks. Collective.

        Args:
            sizes: Allowed sizes in samples, ascending.
            budget_bytes: Upper limit of a rank's memory; None: that of the device.
        """
        batch, _ = sample_batch(self._trainer.train_dataloader, training=True)
        parts = self.limits(1, 1).max_microbatches
        with self._engine.outside_hooks():  # a derived class of the user has called this
            return self._probe(batch, parts, budget_bytes).find(sizes)

    def _probe(self, batch: Any, microbatches: int, budget_bytes: int | None) -> MemoryProbe:
        return MemoryProbe(
            self._runner,
            self._trainer.optimizers,
            batch,
            microbatches=microbatches,
            accumulates=True,
            budget_bytes=budget_bytes,
        )

    def find_token_budget(self, limit: int, budget_bytes: int | None) -> int:
        """Returns the largest token budget of a batch, up to `limit`, that fits on all ranks. Collective."""
        with self._engine.outside_hooks():
            return self._present_budget.find(limit, lambda batch, parts: self._probe(batch, parts, budget_bytes))

    @property
    def _present_budget(self) -> TokenBudget:
        if self.budget is None:
            raise RuntimeError("The training loader's batches have no budget of tokens.")
        return self.budget

    def memory_is_short(self) -> bool:
        """Returns True if an allocation on any rank had to be retried since the last call. Collective."""
        retries = allocation_retries(self._runner.device)
        if retries is None:
            return False
        short = torch.tensor(float(retries > self._retries), device=self._runner.device)
        self._retries = retries
        dist.all_reduce(short)
        return bool(short)

    # ---- changes

    def change_budget(self, tokens: int) -> None:
        """Sets the tokens per batch of the epoch that is about to begin. Called between two epochs."""
        self._next_budget = None
        self._present_budget.change(tokens)
        self.division = self.first = self._present()

    def change_budget_later(self, tokens: int) -> None:
        """Sets the tokens per batch from the next epoch on."""
        self._next_budget = tokens

    def change(self, division: BatchDivision) -> None:
        """Sets the division of the next optimizer step. Called between two steps, with the same value on all ranks.

        At the end of an epoch, or if the rest of the epoch is too short for one batch of the new size, the change waits
        for the next epoch.

        Raises:
            PartitionError: If the loader's batches cannot have another size.
        """
        if division == self.division:
            return
        if division.batch_size != self.division.batch_size:
            if self._flow is None:
                raise PartitionError(
                    f"The training loader's batches of {self.division.batch_size} samples cannot become batches of "
                    f"{division.batch_size}: only a DataLoader with a sampler and a length can be read differently."
                )
            self._waits = not self._flow.rebatch(division.batch_size)
            if self._waits:
                self._flow.rebatch_next(division.batch_size)
        self.division, self._due = division, True

    def before_epoch(self) -> None:
        """Prepares the next epoch, for which the user may have created a new loader."""
        flow = self._find_flow()
        if flow is not self._flow and flow is not None:
            flow.rebatch_next(self.division.batch_size)
        self._flow = flow
        if self.budget is not None:
            before = self.budget.tokens
            self._loader = training_loaders(self._trainer).flattened[0]
            self.budget = TokenBudget.of(self._trainer, self._runner, self._loader)
            if self.budget is not None and (self._next_budget or before) != self.budget.tokens:
                self.change_budget(self._next_budget or before)

    def before_batch(self, number: int) -> bool:
        """Prepares training batch `number` of the epoch.

        An epoch's last step has the remaining batches, and its gradient is the mean over those; Lightning divides by
        the number of batches of other steps.

        Returns:
            True if the batch is the first of a step.
        """
        if number == 0:
            self._waits = False
        if number == 0 or (self._due and not self._waits):
            self._due, self._left = False, 0
            self._running = self.division
            if self._runner.mesh.layout.pp > 1:
                budget = self.budget
                self._runner.microbatches = self.division.microbatches if budget is None else budget.microbatches
        begins = self._left == 0
        if begins:
            rest = self._trainer.num_training_batches - number
            self._left = int(min(self._running.accumulate, rest))
            begin_window(self._trainer, self._left)
            if self.noise is not None:
                self.noise.accumulate = self._left
                self.noise.forget()
                self.noise.measures = self.measures
        self._left -= 1
        return begins

    @property
    def learning_rate_factor(self) -> float:
        """Factor on the user's learning rates."""
        return self._engine.optimizers.learning_rate_factor

    def scale_learning_rates(self, factor: float) -> None:
        """Multiplies the user's learning rates by `factor` in the optimizer's next steps."""
        self._engine.optimizers.learning_rate_factor = factor

    # ---- measurements

    def measure_noise(self) -> GradientNoise:
        """Starts measuring the gradient noise, or includes weights that have been unfrozen since.

        Raises:
            PartitionError: If replicas step independently (DiLoCo).
        """
        if self._engine.diloco is not None:
            raise PartitionError(_NO_NOISE)
        if self.noise is None:
            runner = self._runner
            self.noise = GradientNoise(runner.partition, runner.device, getattr(runner.precision, "scaler", None))
            runner.noise = self._engine.optimizers.nonfinite.noise = self.noise
        self.noise.install()
        return self.noise

    def stop_measuring(self) -> None:
        """Stops measuring the gradient noise."""
        if self.noise is not None:
            self.noise.remove()
            self._runner.noise = self._engine.optimizers.nonfinite.noise = self.noise = None

    def release(self) -> None:
        """Restores all settings of Lightning and the user; a second call has no effect."""
        if self not in self._listeners:
            return
        self._listeners.remove(self)
        end_windows(self._trainer)
        self._trainer.accumulate_grad_batches = self._accumulate
        self._runner.microbatches = self._microbatches
        self._engine.optimizers.learning_rate_factor = 1.0
        self.stop_measuring()


def samples_of_all(engine: Engine, batch: Any) -> int:
    """Returns the samples of all replicas in the training batch that has just run."""
    context = engine.runner.context
    if context is None or context.weights is None:
        return engine.mesh.layout.replicas * count_samples(batch)
    return sum(context.weights.counts)


def sum_over_replicas(engine: Engine, count: int) -> int:
    """Returns the sum of the `count` of every replica. Collective."""
    total = torch.tensor(count, device=engine.device)
    if engine.mesh.layout.replicas > 1:
        dist.all_reduce(total, group=engine.mesh.replica_group)
    return int(total)
