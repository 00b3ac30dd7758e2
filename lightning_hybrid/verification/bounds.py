"""Finds bounds in a step that the samples of the first batch do not reach, and that act on the batch as a whole.

`loss.clamp(max=14)`, or a norm over the batch that scales outputs if it is large, make the loss of a batch another one
than the mean over its microbatches, but only for batches with larger values than the verified one. Here half of the
samples get such values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_hybrid.batches import find_samples, split_batch
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.ghosts.trees import map_tensors
from lightning_hybrid.patching import patched
from lightning_hybrid.verification.differences import relative
from lightning_hybrid.verification.whole_step import WholeStep

_OF_BATCH, _OF_UNITS = 300.0, 30.0
"""Factors on half of the samples, of the batch and of each unit's result. Empirical: beyond bounds in models, and
without overflow of squares."""


class BoundCheck:
    """Compares the loss of a batch with the mean over its microbatches where half of the samples have large values.

    Args:
        step: The step on this replica's batch.
        parts: Number of microbatches.
    """

    def __init__(self, step: WholeStep, parts: int) -> None:
        self._step, self._parts = step, parts

    def run(self) -> float:
        """Returns the largest relative difference of the two losses on any rank. Collective."""
        batch, known = self._step.args[0], self._step.engine.runner.known_samples()
        own, samples = 0.0, find_samples(batch, known).count or 0
        for of_batch, of_units in ((_OF_BATCH, 1.0), (1.0, _OF_UNITS)) if samples else ():
            scaled = apply_to_collection(batch, Tensor, _times, _rows(samples, of_batch))
            rows = _rows(samples, of_units)
            whole = self._loss([scaled], rows)
            mean = self._loss(split_batch(scaled, self._parts, known), rows)
            own = max(own, 0.0 if whole is None or mean is None else relative(mean, whole))
        return max(gather_objects(own))

    def _loss(self, batches: list[Any], rows: Tensor) -> float | None:
        """Returns the mean loss of `batches`; None if the step fails on such values, or if it is not finite."""
        step, engine = self._step, self._step.engine
        shares = step.shares(len(batches)) or [1.0] * len(batches)
        root, units = engine.runner.root, engine.partition.interceptor.units.names
        larger = _larger_results(root, [root.get_submodule(unit) for unit in units], rows.chunk(len(batches)))
        with larger if bool((rows != 1).any()) else nullcontext():
            try:
                loss = step.mean([(batch, *step.args[1:]) for batch in batches], shares).loss
            except Exception:  # noqa: BLE001 -- checks of the user's step, which has not seen such values
                return None
        return None if loss is None or not math.isfinite(float(loss)) else float(loss)


def _times(tensor: Tensor, rows: Tensor) -> Tensor:
    """Returns `tensor` with its rows multiplied by `rows`; masks, and tensors without a row per sample, stay."""
    if not tensor.is_floating_point() or not tensor.ndim or len(tensor) != len(rows) or tensor.layout != torch.strided:
        return tensor
    if bool(((tensor == 0) | (tensor == 1)).all()):
        return tensor
    return tensor * rows.to(tensor).view(-1, *[1] * (tensor.ndim - 1))


def _rows(samples: int, factor: float) -> Tensor:
    rows = torch.ones(samples)
    rows[samples // 2 :] = factor
    return rows


@contextmanager
def _larger_results(root: nn.Module, units: Sequence[nn.Module], parts: Iterable[Tensor]) -> Iterator[None]:
    """Multiplies the rows of what `units` return, in each step by the next of `parts`."""
    rows: list[Tensor] = []
    step: Any = root.training_step
    following = iter(parts)

    def begin(*args: Any, **kwargs: Any) -> Any:
        rows[:] = [next(following)]
        return step(*args, **kwargs)

    def scaled(module: nn.Module, args: tuple, out: Any) -> Any:
        return map_tensors(lambda _, tensor: _times(tensor, rows[0]), out)

    handles = [unit.register_forward_hook(scaled) for unit in units]
    try:
        with patched(root, training_step=begin):
            yield
    finally:
        for handle in handles:
            handle.remove()
