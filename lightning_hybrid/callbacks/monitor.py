"""`HybridMonitor`: logs speed, memory, balance and layout of a run to all loggers."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_hybrid._lightning_private import (
    Callback,
    fetching_seen,
    logged_step,
    logs_after_batch,
    steps_after_batch,
    wandb_loggers,
)
from lightning_hybrid._torch_private import FlopCount, has_compiled_parts, tree_leaves
from lightning_hybrid.batches import count_samples
from lightning_hybrid.callbacks.adaptive_batch_size import AdaptiveBatchSize
from lightning_hybrid.callbacks.events import Events
from lightning_hybrid.callbacks.monitor_values import NORM, RankMeasurements, expert_values, values_of
from lightning_hybrid.callbacks.peak_flops import peak_flops
from lightning_hybrid.callbacks.required import hybrid_strategy
from lightning_hybrid.callbacks.step_window import StepWindow
from lightning_hybrid.callbacks.wandb_report import WandbReport, join_run
from lightning_hybrid.collectives import all_gather_single
from lightning_hybrid.device_memory import peak_bytes
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.step_times import StepTimes
from lightning_hybrid.patching import patched
from lightning_hybrid.spec.request import Request

_FLOP_TRIES = 3
"""Batches in which operations are counted at most: a count is void if a pipeline has prepared a new form of batches."""


class HybridMonitor(Callback):
    """Logs speed, memory, balance and layout to all loggers of the Trainer, every `log_every_n_steps` steps.

    Rates are those of training since the last logged step: validation is left out. The first two batches (warm-up, and
    a count of floating point operations) are left out, too, and so are the first two in a new layout. The keys are
    listed in the documentation, under "Monitor". Ranks communicate on logged steps only.

    Args:
        tokens: How tokens are counted: `"auto"`, the elements of the batch's first tensor of integers with two
            dimensions, such as `input_ids`; a function that returns the number of tokens of a batch, from its shapes;
            or None, not at all.
        count_flops: Count the floating point operations of the second batch, for TFLOP/s and MFU. Not possible where
            code is compiled.
        peak_tflops: Highest rate of a device, in units of 10^12 operations per second, for MFU. None: from a table of
            data sheets, by the device's name and the Trainer's precision.
        progress_bar: Show tokens (or samples) per second in the progress bar.
        wandb_pictures: Draw the balance of stages and experts for loggers of Weights & Biases.
        wandb_every_node: Show the system metrics of every node in Weights & Biases, not only of the first one; needs a
            run in the mode `"shared"`.

    Raises:
        ValueError: If an argument is not one of its possible values.
    """

    def __init__(
        self,
        *,
        tokens: Literal["auto"] | Callable[[Any], int] | None = "auto",
        count_flops: bool = True,
        peak_tflops: float | None = None,
        progress_bar: bool = True,
        wandb_pictures: bool = True,
        wandb_every_node: bool = False,
    ) -> None:
        if not (tokens is None or tokens == "auto" or callable(tokens)):
            raise ValueError(f"`tokens` must be 'auto', a function or None. Got {tokens!r}.")
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"`peak_tflops` must be larger than 0. Got {peak_tflops}.")
        self._count_tokens = count_integers if tokens == "auto" else tokens
        self._counts_flops, self._peak_tflops, self._progress_bar = count_flops, peak_tflops, progress_bar
        self._pictures, self._every_node = wandb_pictures, wandb_every_node
        self._report: WandbReport | None = None
        self._events: Events | None = None
        self._node_client: Any = None
        self._layout = ""
        self._window = StepWindow()
        self._engine: Engine | None = None
        self._times: StepTimes | None = None
        self._batches = 0
        """Of this run in the present layout."""
        self._step_samples = self._step_tokens = 0.0
        self._flops_per_unit: tuple[float, float] | None = None
        """Operations per token, or per sample where tokens are not counted, without and of recomputation."""
        self._flop_tries = 0
        """Batches in which operations may still be counted in the present layout."""
        self._forms: set[Any] = set()
        self._begun: Engine | None = None
        """The engine of the running batch."""
        self._peak: float | None = None
        self._compiled = 0
        self._shown: dict[str, str] = {}
        self.values: dict[str, float] = {}
        """The values that were logged last, by key."""
        self.expert_loads: dict[str, list[int]] = {}
        """Tokens of each expert between the last two logged steps, by module."""

    # ---- start and end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            hybrid_strategy(trainer, self)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = hybrid_strategy(trainer, self)
        self._compiled, self._shown = _compiled_frames(), {}
        self._peak = self._find_peak(trainer, strategy.root_device)
        self._events, self._report = Events(trainer), None
        if wandb_loggers(trainer) and trainer.is_global_zero:
            self._report = WandbReport(trainer, self._pictures)
            self._report.show_plan(strategy.plan, logged_step(trainer))
        if self._every_node:
            self._node_client = join_run(trainer)
        self._follow(strategy.engine)
        strategy.listeners.append(self)
        patches = strategy.engine.run.patches
        patches.callback(self._end_run)
        patches.enter_context(fetching_seen(trainer, self._window.fetching_begins, self._window.fetching_ends))
        bar = trainer.progress_bar_callback
        if self._progress_bar and bar is not None:
            own = bar.get_metrics
            patches.enter_context(patched(bar, get_metrics=lambda *args: {**own(*args), **self._shown}))

    def _follow(self, engine: Engine) -> None:
        """Measures steps of `engine`. Collective."""
        self._engine, self._times = engine, StepTimes(engine.runner)
        self._times.install()
        self._layout = str(engine.plan.layout)
        self._batches, self._flops_per_unit, self._flop_tries = 0, None, _FLOP_TRIES
        self._step_samples = self._step_tokens = 0.0
        self._window.restart(None)
        engine.expert_loads(self)

    def _end(self) -> None:
        if self._engine is not None and self._times is not None:
            self._times.remove()
            self._engine.runner.flops = None
            self._engine.optimizers.nonfinite.keeps_norms = False
        self._engine = self._times = None

    def _end_run(self) -> None:
        self._end()
        self._report = self._events = None
        if self._node_client is not None:
            self._node_client.finish()
        self._node_client = None

    def check_layout(self, request: Request) -> None:
        """Accepts every layout."""

    def layout_changed(self, engine: Engine) -> None:
        """Measures in the new layout."""
        if self._engine is None:
            return
        trainer, before = engine.run.trainer, self._layout
        self._end()
        self._follow(engine)
        if self._events is not None and self._layout != before:
            self._events.add(trainer.global_step, "relayout", f"{before} -> {self._layout}")
        if self._report is not None:
            self._report.show_plan(engine.plan, logged_step(trainer), changed=True)

    # ---- batches

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        engine, times = self._engine, self._times
        if engine is None or times is None:
            return
        engine.optimizers.nonfinite.keeps_norms = logs_after_batch(trainer)
        times.measures = self._window.begin_batch()
        self._begun = engine
        if self._batches and self._flops_per_unit is None and self._flop_tries and self._can_count_flops(engine):
            engine.runner.flops, self._forms = FlopCount(), _forms(engine)
            self._flop_tries -= 1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        engine, times = self._engine, self._times
        if engine is None or times is None or engine is not self._begun:  # a callback has changed the layout
            return
        times.measures = False
        samples, tokens = self._count(engine, batch)
        self._note_flops(engine, samples, tokens)
        self._batches += 1
        self._step_samples += samples
        self._step_tokens += tokens
        self._window.add(samples, tokens)
        if not steps_after_batch(trainer):
            return
        self._window.end_step(time.perf_counter())
        warm = self._batches > (2 if self._counts_flops else 1) - 1
        if logs_after_batch(trainer):
            self._log(trainer, engine, times)
        if warm and (logs_after_batch(trainer) or not self._window.counts):
            times.reset()
            self._window.restart(time.perf_counter())
        self._step_samples = self._step_tokens = 0.0

    def _count(self, engine: Engine, batch: Any) -> tuple[float, float]:
        """Returns the samples and tokens of this replica's batch, without padding; NaN for tokens not counted."""
        padding = engine.runner.padding
        tokens = None if self._count_tokens is None else self._count_tokens(batch)
        if tokens is None:
            return 0.0 if padding else float(count_samples(batch)), math.nan
        return (0.0, 0.0) if padding else (float(count_samples(batch)), float(tokens))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._window.pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._window.resume()

    # ---- floating point operations

    def _can_count_flops(self, engine: Engine) -> bool:
        compiled = engine.plan.compile or _compiled_frames() > self._compiled or has_compiled_parts(engine.root)
        if self._counts_flops and compiled:
            self._flop_tries = 0
            rank_zero_info(
                "HybridMonitor: operations are not counted, because code is compiled: no TFLOP/s and no MFU."
            )
            return False
        return self._counts_flops

    def _note_flops(self, engine: Engine, samples: float, tokens: float) -> None:
        counter, engine.runner.flops = engine.runner.flops, None
        unit = tokens if tokens > 0 else samples
        if counter is not None and unit > 0 and _forms(engine) == self._forms:
            self._flops_per_unit = counter.flops / unit, counter.recomputed_flops / unit

    def _find_peak(self, trainer: pl.Trainer, device: torch.device) -> float | None:
        if self._peak_tflops is not None:
            return self._peak_tflops * 1e12
        precision = str(trainer.precision)
        dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
        found = peak_flops(device, dtype)
        if found is None and self._counts_flops:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            what = str(dtype).removeprefix("torch.")
            rank_zero_info(
                f"HybridMonitor: the peak rate of `{name}` in {what} is unknown: no MFU without `peak_tflops`."
            )
        return found

    # ---- logged steps

    def _log(self, trainer: pl.Trainer, engine: Engine, times: StepTimes) -> None:
        """Logs the values of all ranks since the last logged step. Collective."""
        values = values_of(self._gather(engine, times), engine.plan, self._peak)
        self.expert_loads = {name: found.tolist() for name, found in engine.expert_loads(self).items()}
        values |= expert_values(self.expert_loads, engine.plan)
        noise = _noise_scale(trainer)
        if noise is not None:
            values["batch/noise_scale"] = noise
        events = self._events.collect(trainer.global_step) if self._events is not None else []
        values |= {f"events/{kind}": float(n) for kind, n in (self._events.counts if self._events else {}).items()}
        self.values = values
        for unit in ("samples", "tokens"):
            if (rate := values.get(f"throughput/{unit}_per_second")) is not None:
                self._shown = {f"{unit}_per_second": f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logged_step(trainer))
        if self._report is not None:
            self._report.show_events(events, logged_step(trainer))
            self._report.draw(values, self.expert_loads, engine.plan, logged_step(trainer))

    def _gather(self, engine: Engine, times: StepTimes) -> list[list[float]]:
        """Returns the measurements of each rank, followed by the seconds of all stages, by rank. Collective."""
        own = RankMeasurements(
            **self._window.measurements(),
            step_samples=self._step_samples,
            step_tokens=self._step_tokens,
            peak_bytes=float(peak_bytes(engine.device)),
        )
        stages = [0.0] * len(engine.plan.stages)
        if self._window.split_steps:
            split = times.read()
            own = replace(own, computation=split.computation, communication=split.communication, bubble=split.bubble)
            for stage, seconds in split.stages.items():
                stages[stage] = seconds
        if self._flops_per_unit is not None and self._window.counts:
            units = self._window.tokens if self._window.tokens > 0 else self._window.samples
            flops, recomputed = (per_unit * units for per_unit in self._flops_per_unit)
            own = replace(own, flops=flops, recomputed_flops=recomputed)
        row = torch.tensor([*own.row(), *stages], dtype=torch.float64, device=engine.device)
        norms = engine.optimizers.nonfinite.norms
        if norms:
            row[NORM] = torch.stack([norm.to(row) for norm in norms.values()]).square().sum().sqrt()
        norms.clear()
        rows = row.new_empty(torch.distributed.get_world_size() * len(row))
        all_gather_single(rows, row)
        return rows.view(-1, len(row)).tolist()


def count_integers(batch: Any) -> int | None:
    """Returns the elements of a batch's first tensor of integers with two dimensions; None if it has no such tensor."""
    kinds = (torch.int32, torch.int64)
    leaves = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))
    return next((leaf.numel() for leaf in leaves if leaf.ndim == 2 and leaf.dtype in kinds), None)


def _forms(engine: Engine) -> set[Any]:
    """Returns the forms of batches that the pipeline has prepared; preparing one runs the step on ghosts."""
    pipeline = engine.runner.pipeline
    return set() if pipeline is None else set(pipeline.prepared)


def _noise_scale(trainer: pl.Trainer) -> float | None:
    """Returns the noise scale that `AdaptiveBatchSize` has measured, in samples; None if there is none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    found = next((c.noise_scale for c in callbacks if isinstance(c, AdaptiveBatchSize)), None)
    return found if found is not None and math.isfinite(found) else None


def _compiled_frames() -> int:
    """Returns the number of functions that `torch.compile` has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["frames"]["ok"]
