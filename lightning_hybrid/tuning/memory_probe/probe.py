"""Finds the largest microbatch that fits on every rank, before training, by trial steps of each rank alone."""

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
from lightning_hybrid.engine.loss_weights import loss_of
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.engine.trials import (
    drop_gradients,
    preserved_training_state,
    step_undone,
    tensors_in,
)
from lightning_hybrid.tuning.memory_probe.collectives import without_peers
from lightning_hybrid.tuning.memory_probe.tracker import MemoryTracker

_FITTED_SIZES = (2, 4)
"""Sizes of the two steps that the peak is predicted from."""


class ProbeError(RuntimeError):
    """Raised on all ranks if no microbatch was found."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Result of a memory probe."""

    size: int
    """Samples of the largest microbatch that fits on all ranks; equal on all ranks."""
    limited_by: int
    """The first rank on which no larger one of the allowed sizes fits."""
    own_size: int
    """The largest allowed size that fits on this rank, confirmed by a step."""
    fit: MemoryFit | None
    """The model of this rank's peak; None if there are too few allowed sizes to fit one, or too little memory."""
    predicted_bytes: int | None
    """Predicted peak of a step with `own_size`."""
    measured_bytes: int
    """Measured peak of the step that confirmed `own_size`."""
    trials: int
    """Number of trial steps of the search, without those for the fit."""


@dataclass
class _Found:
    """Result of this rank alone."""

    size: int = 0
    fit: MemoryFit | None = None
    peaks: dict[int, int] | None = None
    trials: int = 0


class MemoryProbe:
    """Tries microbatches on this rank alone, with fake collectives, and uses the smallest limit of all ranks.

    A trial is a training step on a batch made of the samples of the first one: forward and backward pass and reduction
    of gradients, while the gradients of the last step and the state of the optimizers exist. Weights, gradients,
    optimizers, buffers, metrics and RNG state are restored afterwards.

    The search starts at the largest size that is predicted to fit from the memory of two small steps.

    Args:
        runner: The partitioned module.
        optimizers: The optimizers of the module.
        batch: A first batch as its loader yields it (see `dataloader.peek.sample_batch`).
        microbatches: Number of microbatches of a step under `pp`.
        accumulates: True if a step of the optimizer uses the gradients of several batches.
        budget_bytes: Upper limit of the memory; None: that of the device.
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
                "`microbatches` must be 1 without a pipeline, or if the step does something once for the whole batch, "
                "such as BatchNorm, and at least 1 with one. "
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
        """True if gradients of a previous step exist."""

    # ---- all ranks

    def find(self, ladder: Sequence[int]) -> ProbeResult:
        """Finds the largest size in `ladder` that fits on all ranks. Collective over all ranks.

        Args:
            ladder: The allowed sizes in samples, ascending; equal on all ranks.

        Raises:
            ProbeError: On all ranks, if a trial of any rank failed other than for lack of memory, or if no size fits.
        """
        found, problem = _Found(), None
        try:
            found = self._alone(ladder)
        except Exception as error:  # noqa: BLE001 -- after any error the other ranks wait for this one
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
        """Returns the smallest size of all ranks and the first rank with it; the only collective of a working probe."""
        ranks = dist.get_world_size()
        smallest = torch.tensor([size * ranks + dist.get_rank()], dtype=torch.int64, device=self._device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return divmod(int(smallest.item()), ranks)

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
        """Returns the bytes that this rank may use; None if they are unknown."""
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
        """Returns the bytes alive after each allocation of a step; None if memory is too short."""
        tracker = MemoryTracker(self._device)
        gc.disable()  # garbage is collected at random places, and two profiles are compared place by place
        try:
            peak = self._measured(size, tracker)
        finally:
            gc.enable()
        if peak is None:
            return None
        unseen = max(0, peak - tracker.peak_bytes)  # of an allocator's peak
        return [place + unseen for place in tracker.profile()]

    def _peak(self, size: int) -> int | None:
        """Returns the peak of a step in bytes; None if memory is too short."""
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
        """Runs a step; returns False if memory is too short."""
        try:
            with step_undone(self._runner), ExitStack() as stack:
                if tracker is not None:
                    stack.enter_context(tracker)
                stack.enter_context(without_peers())
                stack.enter_context(self._runner.order.paused())
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
        """Computes the gradients of one optimizer step; drops old gradients after the forward pass, as Lightning."""
        runner = self._runner
        runner.noise = None
        runner.microbatches = self._microbatches
        # the only objects that ranks exchange in a step
        vars(runner).update(_log=lambda *_: None, _share=lambda *_: (torch.zeros(()), {}))
        if self._accumulates:
            with runner.gradients.local_only():
                self._forward_and_backward(size, first=True)
        self._forward_and_backward(size, first=not self._accumulates)

    def _forward_and_backward(self, size: int, *, first: bool) -> None:
        runner, root = self._runner, self._runner.root
        batch = runner.precision.convert_input(tiled_batch(self._batch, size * self._microbatches))
        batch = batch_on_device(root, batch, self._device)
        index = (0,) if is_param_in_hook_signature(root.training_step, "batch_idx", min_args=2) else ()
        out = runner.weighted_step(None, 1.0, batch, *index)
        if first:
            drop_gradients(self._parameters)
        loss = loss_of(out)
        if isinstance(loss, Tensor):
            runner.precision.backward(loss, root, None)

    def _measure_optimizers(self, size: int) -> int | None:
        """Makes the optimizers create their state, as in the first step, and returns the peak in bytes.

        Learning rates and gradients are set to 0; values that change nevertheless are restored later. Returns None if
        memory is too short.
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
        """Starts a measurement with the tensors that exist between two steps."""
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
    """Freezes existing objects, so that `gc.collect()` is cheap in each trial, unless the user froze some already."""
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
    """Runs a step that allocates the same memory as the first step, and changes no weight."""
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            if parameter.grad is not None:
                to_local(parameter.grad).zero_()
    step_without_hooks(optimizer, lambda: torch.zeros(()))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Returns True if `error`, or an error that it was raised from, reports a lack of memory."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error):
            return True
        if isinstance(error, RuntimeError) and "bad_alloc" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
