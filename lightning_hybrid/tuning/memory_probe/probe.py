"""The largest microbatch that every rank has memory for, found before training, by trial steps of each rank alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lightning_hybrid._lightning_private import batch_on_device
from lightning_hybrid._torch_private import step_without_hooks
from lightning_hybrid.adapt.memory import MemoryFit, fit_profiles, search_largest
from lightning_hybrid.batches import tiled_batch
from lightning_hybrid.collectives import to_local
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.tuning.memory_probe.collectives import without_peers
from lightning_hybrid.tuning.memory_probe.preserve import (
    drop_gradients,
    preserved_training_state,
    step_undone,
    tensors_in,
)
from lightning_hybrid.tuning.memory_probe.tracker import MemoryTracker

_FITTED_SIZES = (2, 4)
"""Sizes of the two steps that the peak is predicted from."""


class ProbeError(RuntimeError):
    """No microbatch was found; raised on all ranks."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a memory probe has found."""

    size: int
    """The microbatch, in samples, that fits on all ranks; the same on all of them."""
    limited_by: int
    """The first rank on which no larger one of the allowed sizes fits."""
    own_size: int
    """The largest allowed size that fits on this rank, confirmed by a step."""
    fit: MemoryFit | None
    """The model of this rank's peak; None where the allowed sizes leave nothing to predict, or memory is too short."""
    predicted_bytes: int | None
    """The peak of a step with `own_size` by the fit."""
    measured_bytes: int
    """The peak of the step that confirmed it."""
    trials: int
    """Steps that the search took, beside the two for the fit."""


@dataclass
class _Found:
    """What this rank has found by itself."""

    size: int = 0
    fit: MemoryFit | None = None
    peaks: dict[int, int] | None = None
    trials: int = 0


class MemoryProbe:
    """Tries microbatches on this rank alone, with collectives stood in for, and has the ranks agree.

    A trial is what a step of training is, on a batch made of the samples of the first one: forward and backward pass,
    reduction of gradients, the gradients of the last step and the state of the optimizers being there. Afterwards
    nothing has changed: weights, gradients, optimizers, buffers, metrics, RNG state.

    The search begins at the size that should be the largest to fit, by the memory of two small steps.

    Args:
        runner: The partitioned module.
        optimizers: Its optimizers.
        batch: A first batch as its loader gives it (see `execute.batches.sample_batch`).
        microbatches: Microbatches of a step under `pp`; a step takes as many times the microbatch's samples.
        accumulates: Whether steps of the optimizer take the gradients of several batches.
        budget_bytes: Memory that may be used; None: what the device has.
    """

    def __init__(
        self,
        runner: StepRunner,
        optimizers: Sequence[Optimizer],
        batch: Any,
        *,
        microbatches: int = 1,
        accumulates: bool = False,
        budget_bytes: int | None = None,
    ) -> None:
        if microbatches < 1 or (microbatches > 1 and (runner.pipeline is None or runner.one_microbatch)):
            raise ValueError(
                "`microbatches` must be 1 without a pipeline, or with a BatchNorm, and at least 1 with one. "
                f"Got {microbatches} under `layout='{runner.mesh.layout}'`."
            )
        if budget_bytes is not None and budget_bytes < 1:
            raise ValueError(f"`budget_bytes` must be at least 1. Got {budget_bytes}.")
        if not runner.root.automatic_optimization:
            raise ValueError(
                f"`automatic_optimization=False`: a trial step of {type(runner.root).__name__} would update its "
                "weights. Give the microbatch size yourself, or use automatic optimization."
            )
        self._runner, self._optimizers, self._batch = runner, list(optimizers), batch
        self._microbatches, self._accumulates, self._budget = microbatches, accumulates, budget_bytes
        self._device = runner.device
        self._parameters: list[Any] = []
        self._warm = False
        """Whether the gradients of a last step are there."""

    # ---- all ranks

    def find(self, ladder: Sequence[int]) -> ProbeResult:
        """The largest of the sizes in `ladder` that fits on all ranks. Collective over all of them.

        Args:
            ladder: The allowed sizes in samples, ascending; equal on all ranks.

        Raises:
            ProbeError: On all ranks, if anything but a lack of memory ended a trial on one of them, or nothing fits.
        """
        found, problem = _Found(), None
        try:
            found = self._alone(ladder)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the other ranks wait for this one
            problem = error
        size, rank = self._agree(-1 if problem is not None else found.size)
        if size < 0:
            box = [f"{type(problem).__name__}: {problem}" if dist.get_rank() == rank else None]
            dist.broadcast_object_list(box, rank, device=self._device)
            raise ProbeError(f"The memory probe has failed on rank {rank}: {box[0]}") from problem
        if size == 0:
            limit = "" if self._budget is None else ", or its `budget_bytes`"
            raise ProbeError(
                f"Not even a microbatch of {ladder[0]} fits into the memory of rank {rank}{limit}. Use smaller "
                "microbatches, more shards (`fsdp`, `tp`, `pp`), or `recompute`."
            )
        return ProbeResult(
            size=size,
            limited_by=rank,
            own_size=found.size,
            fit=found.fit,
            predicted_bytes=None if found.fit is None else found.fit.predict(found.size),
            measured_bytes=(found.peaks or {})[found.size],
            trials=found.trials,
        )

    def _agree(self, size: int) -> tuple[int, int]:
        """The smallest size of all ranks, and the first rank that has it; the one collective of a probe that works."""
        ranks = dist.get_world_size()
        told = torch.tensor([size * ranks + dist.get_rank()], dtype=torch.int64, device=self._device)
        dist.all_reduce(told, dist.ReduceOp.MIN)
        return divmod(int(told.item()), ranks)

    # ---- this rank

    def _alone(self, ladder: Sequence[int]) -> _Found:
        found = _Found(peaks={})
        with self._prepared(ladder[0]):
            optimizer_bytes = self._measure_optimizers(ladder[0])
            if optimizer_bytes is None or optimizer_bytes > (self._budget or optimizer_bytes):
                return found
            found.fit = self._fit(optimizer_bytes, ladder)
            start = ladder[0]
            if found.fit is not None and (budget := self._budget_to_predict()) is not None:
                start = found.fit.largest(budget, ladder[-1])

            def fits(size: int) -> bool:
                found.trials += 1
                peak = self._peak(size)
                if peak is None or (self._budget is not None and peak > self._budget):
                    return False
                found.peaks[size] = max(peak, optimizer_bytes)  # type: ignore[index]
                return True

            found.size = search_largest(ladder, start, fits) or 0
        return found

    @contextmanager
    def _prepared(self, smallest: int) -> Iterator[None]:
        self._runner.gradients.follow_frozen()
        self._parameters = list(self._runner.partition.parameters.local().values())
        self._smallest, self._warm = smallest, False
        try:
            with _old_objects_left_out(), preserved_training_state(self._parameters, self._optimizers):
                yield
        finally:
            self._parameters = []
            self._release()

    def _budget_to_predict(self) -> int | None:
        """Bytes that this rank may use; None where only a trial tells."""
        if self._budget is not None or self._device.type != "cuda":
            return self._budget
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device)

    def _fit(self, optimizer_bytes: int, ladder: Sequence[int]) -> MemoryFit | None:
        sizes = _FITTED_SIZES if ladder[-1] >= _FITTED_SIZES[-1] else (1, 2)
        if ladder[-1] < sizes[-1]:
            return None
        profiles: dict[int, Sequence[int]] = {}
        for size in sizes:
            profile = self._profile(size)
            if profile is None:
                return None
            profiles[size] = profile
        return fit_profiles(optimizer_bytes, profiles)

    # ---- trials

    def _profile(self, size: int) -> list[int] | None:
        """Bytes alive after each allocation of a step; None without enough memory."""
        tracker = MemoryTracker(self._device)
        gc.disable()  # when it collects is a matter of chance, and two profiles are compared place by place
        try:
            peak = self._measured(size, tracker)
        finally:
            gc.enable()
        if peak is None:
            return None
        unseen = max(0, peak - tracker.peak_bytes)  # of an allocator's peak
        return [place + unseen for place in tracker.profile()]

    def _peak(self, size: int) -> int | None:
        """The peak of a step; None without enough memory."""
        return self._measured(size, None if self._device.type == "cuda" else MemoryTracker(self._device))

    def _measured(self, size: int, tracker: MemoryTracker | None) -> int | None:
        if not self._warm and not self._run(self._smallest, None):
            return None
        self._warm = True
        self._begin(tracker)
        if not self._run(size, tracker):
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return None if tracker is None else tracker.peak_bytes

    def _run(self, size: int, tracker: MemoryTracker | None) -> bool:
        """Runs a step; False without enough memory."""
        try:
            with step_undone(self._runner), ExitStack() as stack:
                if tracker is not None:
                    stack.enter_context(tracker)
                stack.enter_context(without_peers())
                self._step(size)
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # here, where the error and with it the frames of the step are gone
        drop_gradients(self._parameters)
        self._warm = False
        self._release()
        return False

    def _step(self, size: int) -> None:
        """Gradients of one step of the optimizer, as Lightning has it: gradients go between forward and backward."""
        runner = self._runner
        runner.noise = None
        runner.microbatches = self._microbatches
        # the one thing in a step that ranks tell each other as objects
        vars(runner)["_log"] = lambda *_: (torch.zeros(()), {})
        if self._accumulates:
            with runner.gradients.local_only():
                self._forward_and_backward(size, first=True)
        self._forward_and_backward(size, first=not self._accumulates)

    def _forward_and_backward(self, size: int, *, first: bool) -> None:
        runner, root = self._runner, self._runner.root
        batch = runner.precision.convert_input(tiled_batch(self._batch, size * self._microbatches))
        batch = batch_on_device(root, batch, self._device)
        index = (0,) if is_param_in_hook_signature(root.training_step, "batch_idx", min_args=2) else ()
        out = runner.training_step(None, 1.0, batch, *index)
        if first:
            drop_gradients(self._parameters)
        loss = out.get("loss") if isinstance(out, dict) else out
        if isinstance(loss, Tensor):
            runner.precision.backward(loss, root, None)

    def _measure_optimizers(self, size: int) -> int | None:
        """Has the optimizers make their state, as in the first step; the peak of it, None without enough memory.

        The learning rate is 0 and the gradients are zeros; what changes nevertheless is restored later.
        """
        if not self._run(size, None):
            return None
        self._warm = True
        tracker = MemoryTracker(self._device)
        self._begin(tracker)
        try:
            with tracker, without_peers(), torch.no_grad():
                for optimizer in self._optimizers:
                    _step_in_place(optimizer)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return tracker.peak_bytes

    def _begin(self, tracker: MemoryTracker | None) -> None:
        """A measurement begins with what is there between two steps."""
        self._release()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        if tracker is None:
            return
        tracker.count(self._parameters)
        tracker.count(self._runner.root.buffers())
        tracker.count(p.grad for p in self._parameters if p.grad is not None)
        for optimizer in self._optimizers:
            tracker.count(tensors_in(optimizer.state))

    def _release(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _old_objects_left_out() -> Iterator[None]:
    """Inside, garbage is looked for among new objects only, since that is done at each trial; unless a user does so."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _step_in_place(optimizer: Optimizer) -> None:
    """A step that allocates what the first one does, and moves no weight."""
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            if parameter.grad is not None:
                to_local(parameter.grad).zero_()
    step_without_hooks(optimizer, lambda: torch.zeros(()))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that there is not enough memory."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error):
            return True
        if isinstance(error, RuntimeError) and "bad_alloc" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
