"""Training batches that change size while training goes on, between two steps of the optimizer."""

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
from lightning_hybrid.engine.engine import Engine, Listener
from lightning_hybrid.engine.gradient_noise import GradientNoise
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.request import Request
from lightning_hybrid.spec.stages import choose_microbatches, divides_into
from lightning_hybrid.tuning.device_memory import allocation_retries, device_name
from lightning_hybrid.tuning.memory_probe.probe import MemoryProbe, ProbeResult
from lightning_hybrid.tuning.token_budget import TokenBudget

MICROBATCHES_PER_RANK = 8
"""A batch is made of at most so many microbatches for each pipeline rank, where memory does not grow with them: a
bubble of a ninth (see `plan.stages.bubble`), and batches that stay small."""
_NO_NOISE = (
    "`statistics` compares the gradients of replicas with their mean, which `gradient_sync='diloco'` does not take. "
    "Set `statistics=None`, or use another `gradient_sync`."
)


class BatchSizePolicy(Protocol):
    """Who decides on batch sizes, asked where the layout changes."""

    def division_under(self, request: Request) -> BatchDivision:
        """How the present global batch is divided in another layout.

        Raises:
            PartitionError: If it cannot be.
        """
        ...

    def layout_changed(self) -> None:
        """What was measured belonged to another layout."""
        ...


class BatchSizeController:
    """Divides global batches anew, and keeps gradients, learning-rate schedules and the data's order right.

    Args:
        engine: The engine of the running fit, whose training loaders are set up.
        policy: Who decides; None: batches stay as they are divided where the layout changes.
    """

    def __init__(self, engine: Engine, policy: BatchSizePolicy | None = None) -> None:
        self._engine, self._policy = engine, policy
        self._listeners: list[Listener] = []
        trainer, runner = engine.run.trainer, engine.runner
        self._trainer = trainer
        self._loader = training_loaders(trainer).flattened[0]
        self._flow = self._find_flow()
        self.budget = TokenBudget.of(trainer, runner, self._loader)
        """Where the loader's batches have a budget of tokens; then sizes are in tokens, not in samples."""
        self._next_budget: int | None = None
        self._accumulate = trainer.accumulate_grad_batches
        self._microbatches = runner.microbatches
        self.division = self.first = self._present()
        self._running, self._left = self.division, 0
        self._due, self._waits = True, False
        self._retries = allocation_retries(runner.device) or 0
        self.noise: GradientNoise | None = None
        self.measures = True
        """Whether the step that comes next is measured."""

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
        """How the first global batch would have been divided in another layout."""
        layout, count = request.layout, 1
        if self.budget is not None or layout == self._engine.request.layout:
            return self.first
        size = self.first.batch_size * self.replicas // layout.replicas
        if layout.pp > 1 and not self._runner.one_microbatch:
            count = choose_microbatches(size, request.microbatches, layout.pp, request.schedule)
        return replace(self.first, batch_size=size, microbatches=count)

    def check_layout(self, request: Request) -> None:
        """Whether batches can be divided in another layout.

        Raises:
            PartitionError: If not.
        """
        if request.gradient_sync.kind == "diloco" and self.noise is not None:
            raise PartitionError(_NO_NOISE)
        if self._policy is not None:
            self._policy.division_under(request)

    def layout_changed(self, engine: Engine) -> None:
        """Divides the present global batch in the new layout; data and optimizers have followed it already."""
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

    # ---- what there is

    @property
    def request(self) -> Request:
        """The present layout, and what belongs to it."""
        return self._engine.request

    @property
    def measured_on(self) -> str:
        """What measured times and memory belong to."""
        return f"{self._engine.request.layout} on {device_name(self._runner.device)}"

    @property
    def replicas(self) -> int:
        """Replicas that share a global batch."""
        return self._runner.mesh.layout.replicas

    @property
    def global_batch_size(self) -> int:
        """Samples of all replicas in a step of the optimizer."""
        return self.replicas * self.division.per_replica

    @property
    def can_rebatch(self) -> bool:
        """Whether the loader's batches can have another size. If not, only their number in a step changes."""
        return self._flow is not None

    @property
    def epoch_samples(self) -> int | None:
        """Samples of an epoch, where that is known."""
        return self._flow.samples if self._flow is not None else None

    def limits(self, microbatch_size: int, min_parts: int, request: Request | None = None) -> DivisionLimits:
        """What a division of a global batch has to keep to.

        Args:
            microbatch_size: The largest microbatch, in samples.
            min_parts: Parts with a gradient of their own that a step must have.
            request: In this layout; None: in the present one.
        """
        request = request or self.request
        first, ranks, schedule = self.first_under(request), request.layout.pp, request.schedule
        count = first.microbatches
        if ranks > 1 and not self._runner.one_microbatch and schedule != "GPipe":  # which keeps all of them
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
        """The largest of these microbatches, in samples, that fits into the memory of all ranks. Collective.

        Args:
            sizes: Ascending.
            budget_bytes: What a rank may use; None: what the device has.
        """
        batch, _ = sample_batch(self._trainer.train_dataloader, training=True)
        parts = self.limits(1, 1).max_microbatches
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
        """The largest token budget of a replica's batch, up to `limit`, that fits into the memory of all ranks.

        Collective.
        """
        return self._present_budget.find(limit, lambda batch, parts: self._probe(batch, parts, budget_bytes))

    @property
    def _present_budget(self) -> TokenBudget:
        if self.budget is None:
            raise RuntimeError("The training loader's batches have no budget of tokens.")
        return self.budget

    def memory_is_short(self) -> bool:
        """Whether, since the last call, an allocation on any rank had to be tried again. Collective."""
        retries = allocation_retries(self._runner.device)
        if retries is None:
            return False
        short = torch.tensor(float(retries > self._retries), device=self._runner.device)
        self._retries = retries
        dist.all_reduce(short)
        return bool(short)

    # ---- changes

    def change_budget(self, tokens: int) -> None:
        """The batches of the epoch that is about to begin have so many tokens. Called between two epochs."""
        self._next_budget = None
        self._present_budget.change(tokens)
        self.division = self.first = self._present()

    def change_budget_later(self, tokens: int) -> None:
        """From the next epoch on."""
        self._next_budget = tokens

    def change(self, division: BatchDivision) -> None:
        """The next step of the optimizer is made of such batches. Called between two steps, on all ranks alike.

        At the end of an epoch, or where the rest of it is too short for one such batch, the change waits for the next
        epoch.
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
        """An epoch is about to begin, with another loader where the user has them made anew."""
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
        """Training batch `number` of the epoch is about to run.

        An epoch's last step has the batches that are left, and its gradient is the mean over those; Lightning divides
        by the number that a step has elsewhere.

        Returns:
            Whether it is the first of a step.
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
        """The factor on the user's learning rates."""
        return self._engine.optimizers.learning_rate_factor

    def scale_learning_rates(self, factor: float) -> None:
        """The optimizer's next steps are made with the user's learning rates times `factor`."""
        self._engine.optimizers.learning_rate_factor = factor

    # ---- measurements

    def measure_noise(self) -> GradientNoise:
        """Begins to measure the noise of gradients, or takes in weights that have been unfrozen since.

        Raises:
            PartitionError: If replicas step by themselves.
        """
        if self._engine.diloco is not None:
            raise PartitionError(_NO_NOISE)
        if self.noise is None:
            runner = self._runner
            self.noise = GradientNoise(
                runner.partition, runner.device, getattr(self._trainer.precision_plugin, "scaler", None)
            )
            runner.noise = self._engine.optimizers.nonfinite.noise = self.noise
        self.noise.install()
        return self.noise

    def stop_measuring(self) -> None:
        """Ends it."""
        if self.noise is not None:
            self.noise.remove()
            self._runner.noise = self._engine.optimizers.nonfinite.noise = self.noise = None

    def samples_of(self, batch: Any) -> int:
        """Samples of all replicas in the training batch that has just run."""
        return samples_of_all(self._engine, batch)

    def sum_over_replicas(self, count: int) -> int:
        """The sum of what each replica has counted. Collective."""
        return sum_over_replicas(self._engine, count)

    def release(self) -> None:
        """Gives everything back to Lightning and the user; does nothing the second time."""
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
    """Returns the sum of the counts of all replicas. Collective."""
    total = torch.tensor(count, device=engine.device)
    if engine.mesh.layout.replicas > 1:
        dist.all_reduce(total, group=engine.mesh.replica_group)
    return int(total)
