"""`AdaptiveBatchSize`: finds the microbatch that fits, and adapts the global batch to the gradient noise scale."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import LBFGS, SGD, Optimizer
from typing_extensions import override

from lightning_hybrid._lightning_private import Callback, steps_after_batch, twins
from lightning_hybrid.adapt.batch_schedule import BatchSizeSchedule
from lightning_hybrid.adapt.batch_size import (
    BatchSizeState,
    DecisionRules,
    LearningRateRule,
    Statistics,
    StepTimes,
    Votes,
    learning_rate_factor,
    vote,
    wanted,
)
from lightning_hybrid.adapt.division import BatchDivision, divide
from lightning_hybrid.adapt.gradient_noise import NoiseScale, estimate
from lightning_hybrid.batches import count_tokens
from lightning_hybrid.callbacks.microbatch import LADDER, Memory, Microbatch, warn_of_memory
from lightning_hybrid.callbacks.required import hybrid_strategy
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.renamed import renamed_arguments
from lightning_hybrid.spec.request import Request
from lightning_hybrid.tuning.batch_size import BatchSizeController, samples_of_all, sum_over_replicas
from lightning_hybrid.tuning.memory_probe.probe import is_out_of_memory
from lightning_hybrid.tuning.schedulers_by_samples import SchedulersBySamples


@renamed_arguments(max_micro_batch_size="max_microbatch_size")
class AdaptiveBatchSize(Callback):
    """Adapts the global batch size during training, under every layout of `HybridStrategy`.

    The initial global batch is the loader's batch size, times replicas, times `accumulate_grad_batches`. Every few
    steps the gradient noise scale decides whether a larger batch pays (see `adapt.gradient_noise`). If it does, the
    global batch doubles between two steps: the loader's samples are rebatched in the same order, accumulated and split
    into microbatches. Schedulers with interval `"step"` advance by samples, so the learning rate as a function of
    consumed data does not change. The checkpoint holds all of this state; a resumed run makes the same decisions as
    an uninterrupted one, in another layout too.

    With batches of a token budget (`data.TokenBatchSampler`), `memory` finds the largest budget for which the longest
    and the shortest samples fit, and a resumed run keeps it. Sizes are then in tokens and fixed: set `statistics=None`.

    Logs `global_batch_size`, `learning_rate_factor` and `gradient_noise_scale` (samples) at every decision.

    Args:
        memory: Memory per rank for the search of the largest microbatch by trial steps before training: bytes; a
            fraction of the device's memory, such as 0.9; or `"device"` for all of it. None: no search; the loader's
            batch (under `pp` its microbatch) is the largest microbatch, and the loader's token budget stays.
        statistics: `"norm"`: the batch whose gradient variance is `rules.tolerance` of its mean square; `"time"`: the
            batch with most progress per second, from measured step times; None: not measured, for a `schedule`.
        max_microbatch_size: Upper limit of a microbatch, in samples, or in tokens with a token budget. After an
            out-of-memory failure, restart from the checkpoint with half of the size that failed.
        max_batch_size: Upper limit of the global batch, in samples. None: the samples of an epoch.
        schedule: Batch sizes fixed in advance; excludes `statistics`.
        learning_rate: Factor on the learning rate when the batch is k times the first one: `"sqrt"`, `"adascale"`,
            `"none"`; `"auto"` is `"adascale"` for SGD and `"sqrt"` for other optimizers.
        max_samples: Stops training at the step that reaches this many samples. `max_steps` counts steps of any size.
        max_tokens: Stops training at the step that reaches this many tokens, the elements of a batch's first tensor.
        rules: Thresholds and intervals of the decisions.

    Raises:
        ValueError: If an argument is not one of its possible values.
    """

    def __init__(
        self,
        *,
        memory: Memory | None = None,
        statistics: Statistics | None = "norm",
        max_microbatch_size: int | None = None,
        max_batch_size: int | None = None,
        schedule: BatchSizeSchedule | None = None,
        learning_rate: LearningRateRule = "auto",
        max_samples: int | None = None,
        max_tokens: int | None = None,
        rules: DecisionRules = DecisionRules(),  # noqa: B008 -- frozen
    ) -> None:
        if statistics not in ("norm", "time", None):
            raise ValueError(f"`statistics` must be 'norm', 'time' or None. Got {statistics!r}.")
        if learning_rate not in ("auto", "sqrt", "adascale", "none"):
            raise ValueError(f"`learning_rate` must be 'auto', 'sqrt', 'adascale' or 'none'. Got {learning_rate!r}.")
        if schedule is not None and statistics is not None:
            raise ValueError("`schedule` fixes batch sizes in advance: set `statistics=None` with it.")
        if statistics is None and learning_rate == "adascale":
            raise ValueError("`learning_rate='adascale'` needs the gradient noise: set `statistics='norm'`.")
        for name, value in (
            ("max_microbatch_size", max_microbatch_size),
            ("max_batch_size", max_batch_size),
            ("max_samples", max_samples),
            ("max_tokens", max_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1. Got {value}.")
        self._microbatch = Microbatch(memory, max_microbatch_size)
        self._statistics: Statistics | None = statistics
        self._max_batch_size = max_batch_size
        self._schedule = schedule
        self._rule: LearningRateRule = learning_rate
        self._max_samples, self._max_tokens = max_samples or math.inf, max_tokens or math.inf
        self._rules = rules
        self._counts_tokens = max_tokens is not None or (schedule is not None and schedule.unit == "tokens")
        self._control: BatchSizeController | None = None
        self._schedulers: SchedulersBySamples | None = None
        self._state: BatchSizeState | None = None
        self._noise = NoiseScale(half_life_steps=rules.half_life_steps)
        self._times = StepTimes()
        self._measured_on = ""
        self._samples = self._tokens = 0
        self._seconds, self._begun = 0.0, 0.0
        self.events: list[dict[str, Any]] = []
        """Every change so far: step, samples, and the batch sizes before and after."""

    # ---- current values

    @property
    def batch_size(self) -> int:
        """The global batch size, in samples; available once training has started."""
        return self._present.batch_size

    @property
    def noise_scale(self) -> float | None:
        """The gradient noise scale, in samples; None until it has been measured."""
        return self._noise.samples

    @property
    def division(self) -> BatchDivision:
        """The division of the global batch; available once training has started."""
        return self._batches.division

    @property
    def _present(self) -> BatchSizeState:
        if self._state is None:
            raise RuntimeError("`AdaptiveBatchSize` has a batch size only after training has started.")
        return self._state

    @property
    def _batches(self) -> BatchSizeController:
        if self._control is None:
            raise RuntimeError("`AdaptiveBatchSize` divides batches only while `Trainer.fit` runs.")
        return self._control

    # ---- start

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        hybrid_strategy(trainer, self)
        if not pl_module.automatic_optimization:
            raise PartitionError(
                "`AdaptiveBatchSize` needs automatic optimization: with `automatic_optimization=False` the module "
                "itself decides when the optimizer steps. Remove the callback."
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
        if any(isinstance(c, twins(GradientAccumulationScheduler)) for c in callbacks):
            raise PartitionError(
                "`AdaptiveBatchSize` and `GradientAccumulationScheduler` both change `accumulate_grad_batches`. Use "
                "one of them."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = hybrid_strategy(trainer, self)
        control = self._control = BatchSizeController.start(strategy.engine, strategy.listeners, self)
        self._check_optimizer(trainer.optimizers[0])
        if control.budget is not None:
            self._start_with_tokens(control, strategy.root_device)
        if self._state is None:
            first = control.global_batch_size if self._schedule is None else self._schedule.batch_size(0)
            self._state = BatchSizeState(batch_size=first, first_batch_size=first)
        if control.measured_on != self._measured_on:
            self._microbatch.samples = None
            self.layout_changed()
        if control.budget is None and self._microbatch.is_sought:
            self._microbatch.find(control, strategy.root_device, self._possible_batches())
        control.change(self._present_division(control.request))
        self._schedulers = SchedulersBySamples(trainer, self._state.first_batch_size)
        strategy.engine.run.patches.callback(self._schedulers.release)
        if self._statistics is not None:
            control.measure_noise()
        self._scale_learning_rates()
        self._forget_step()

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            raise PartitionError(
                "`AdaptiveBatchSize` needs an optimizer that uses one gradient per step. Got LBFGS, which evaluates "
                "the closure several times. Use another optimizer, or remove the callback."
            )
        if self._rule == "auto":
            self._rule = "adascale" if isinstance(optimizer, SGD) and self._statistics is not None else "sqrt"

    def _start_with_tokens(self, control: BatchSizeController, device: torch.device) -> None:
        for name, value in (("statistics", self._statistics), ("schedule", self._schedule)):
            if value is not None:
                raise PartitionError(
                    f"`{name}` must be None with batches of a token budget: their numbers of samples and tokens "
                    f"differ from batch to batch. Got {value!r}. Only `memory` adapts them."
                )
        self._microbatch.find_budget(control, device, self._max_batch_size)

    def _possible_batches(self) -> list[int]:
        batches = [self.batch_size]
        limit = self._max_batch_size or self._batches.epoch_samples or LADDER * self.batch_size
        if self._schedule is not None:
            batches += self._schedule.points.values()
        while self._statistics is not None and batches[-1] * self._rules.factor <= limit:
            batches.append(batches[-1] * self._rules.factor)
        return batches

    def _division(self, batch_size: int, request: Request) -> BatchDivision | None:
        first, replicas = self._batches.first_under(request), request.layout.replicas
        min_parts = 2 if self._statistics is not None else 1
        micro = self._microbatch.within(first)
        stays = self._microbatch.samples is None and first.microbatch_size == micro
        parts = replicas * first.accumulate * first.microbatches
        if stays and parts >= min_parts and batch_size == replicas * first.per_replica:
            return first
        return divide(batch_size, self._batches.limits(micro, min_parts, request))

    def _present_division(self, request: Request) -> BatchDivision:
        control, division = self._batches, self._division(self.batch_size, request)
        if division is not None:
            return division
        fixed = "" if control.can_rebatch else f" in batches of {control.first.batch_size}, which cannot be changed"
        unit = "samples" if control.budget is None else "tokens"
        parts = ", and of at least two parts, whose gradients `statistics` compares" if self._statistics else ""
        raise PartitionError(
            f"A global batch of {self.batch_size} {unit} must be made of equal batches of {request.layout.replicas} "
            f"replicas{fixed}{parts}. Choose another `batch_size`, `accumulate_grad_batches` or `layout`."
        )

    # ---- another layout

    def division_under(self, request: Request) -> BatchDivision:
        """Returns the division of the current global batch under `request`. Called by `BatchSizeController`."""
        measured = self._batches.request.layout
        if self._microbatch.memory is not None and request.layout != measured:
            raise PartitionError(
                f"`memory` of `AdaptiveBatchSize` has measured what fits under '{measured}', and "
                f"measures before training only. Change to `layout='{request.layout}'` between two runs, or give "
                "`max_microbatch_size` instead of `memory`."
            )
        return self._present_division(request)

    def layout_changed(self) -> None:
        """Discards measured step times. Called by `BatchSizeController` after a change of layout."""
        self._times, self._measured_on = StepTimes(), self._batches.measured_on

    # ---- steps

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches.before_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        control, state = self._batches, self._present
        if batch_idx == 0 and self._statistics is not None:
            control.measure_noise()  # weights may have been unfrozen
        control.measures = self._rules.measures(state.steps)
        if control.before_batch(batch_idx):
            self._forget_step()
        if self._schedulers is not None:
            self._schedulers.before_step(state.scheduled_samples, state.batch_size)
        self._begun = time.perf_counter()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        noise = self._batches.noise
        if noise is not None and noise.measures and noise.last:
            found = estimate(noise.last, noise.batch_size)
            self._noise = self._noise.updated(*found, self._rules.steps_between(self._present.steps))
            self._scale_learning_rates()

    def _scale_learning_rates(self) -> None:
        state = self._present
        variance = self._noise.noise / state.first_batch_size
        rule = self._rule if self._noise.weight or self._rule != "adascale" else "none"
        self._batches.scale_learning_rates(learning_rate_factor(rule, state.growth, variance, self._noise.signal))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        control, engine = self._batches, hybrid_strategy(trainer, self).engine
        self._seconds += time.perf_counter() - self._begun
        self._samples += samples_of_all(engine, batch)
        if self._counts_tokens:
            self._tokens += count_tokens(batch) or 0
        if not steps_after_batch(trainer):
            return
        tokens = sum_over_replicas(engine, self._tokens) if self._counts_tokens else 0
        state = self._state = self._present.after_step(self._samples, tokens)
        if self._samples == state.batch_size:
            self._times = self._times.updated(state.batch_size, self._seconds, self._rules.half_life_steps)
        self._forget_step()
        if state.samples >= self._max_samples or state.tokens >= self._max_tokens:
            trainer.should_stop = True
        if self._microbatch.halve_if_short(control):
            self._divide_finer()
        if self._schedule is not None:
            self._follow_schedule(pl_module, self._schedule)
        elif self._statistics is not None and state.steps % self._rules.every_n_steps == 0:
            self._decide(trainer, pl_module, state)

    def _forget_step(self) -> None:
        self._samples = self._tokens = 0
        self._seconds = 0.0

    def _divide_finer(self) -> None:
        division = self._division(self.batch_size, self._batches.request)
        if division is not None:
            rank_zero_warn(
                f"AdaptiveBatchSize: memory ran short in two consecutive steps; microbatches are halved: {division}."
            )
            self._batches.change(division)

    # ---- decisions

    def _decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: BatchSizeState) -> None:
        target = wanted(self._statistics or "norm", state, self._noise, self._times, self._rules)
        target = trainer.strategy.broadcast(target)  # step times differ between ranks
        size, votes = vote(state.batch_size, target, state.votes, self._rules)
        self._state = replace(state, votes=votes)
        self._change(size)
        self._log(pl_module)

    def _follow_schedule(self, pl_module: pl.LightningModule, schedule: BatchSizeSchedule) -> None:
        control, state = self._batches, self._present
        consumed = state.samples if schedule.unit == "samples" else state.tokens
        size = schedule.batch_size(consumed, control.replicas * control.first.microbatch_size)
        if size != state.batch_size:
            self._change(size)
            self._log(pl_module)

    def _log(self, pl_module: pl.LightningModule) -> None:
        factor = self._batches.learning_rate_factor
        values = {"global_batch_size": float(self.batch_size), "learning_rate_factor": factor}
        if self.noise_scale is not None and math.isfinite(self.noise_scale):
            values["gradient_noise_scale"] = self.noise_scale
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def _change(self, size: int) -> None:
        state, control = self._present, self._batches
        limit = self._max_batch_size or control.epoch_samples or size
        if size == state.batch_size or not self._rules.min_batch_size <= size <= limit:
            return
        division = self._division(size, control.request)
        if division is None:
            return
        self.events.append({"step": state.steps, "samples": state.samples, "from": state.batch_size, "to": size})
        noise = f" at a noise scale of {self.noise_scale:.0f}" if self.noise_scale is not None else ""
        rank_zero_info(f"AdaptiveBatchSize: {state.batch_size} -> {size} samples{noise}: {division}.")
        self._state = replace(state, batch_size=size, votes=Votes())
        control.change(division)
        self._scale_learning_rates()

    # ---- end and checkpoints

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._control is not None and is_out_of_memory(exception):
            warn_of_memory(self._control, trainer.global_rank)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._schedulers = self._control = None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._state is None:
            return {}
        return {
            "state": asdict(self._state),
            "noise": asdict(self._noise),
            "times": asdict(self._times),
            "measured_on": self._measured_on,
            "microbatch_size": self._microbatch.samples,
            "token_budget": self._microbatch.tokens,
            "events": list(self.events),
        }

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not state_dict:
            return
        state = dict(state_dict["state"])
        self._state = BatchSizeState(**{**state, "votes": Votes(**state["votes"])})
        self._noise = NoiseScale(**state_dict["noise"])
        self._times, self._measured_on = StepTimes(**state_dict["times"]), state_dict["measured_on"]
        self._microbatch.samples = state_dict.get("microbatch_size", state_dict.get("micro_batch_size"))
        self._microbatch.tokens = state_dict.get("token_budget")
        self.events = list(state_dict["events"])
