"""Checks that the loss of a step is the mean over samples, or over tokens: the mean of the losses of parts of a batch.

Replicas average their gradients by that rule, so the mean over replicas is the gradient of one process. Where user code
acts on gradients within the backward pass, gradients are compared by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.batches import find_samples, split_batch
from lightning_hybrid.collectives import error_message, first_problem, gather_objects
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.loss_weights import place_of
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas.batch_norm import has_batch_norm, normalizes_by_batch_only
from lightning_hybrid.verification.differences import bound_of, differences, relative
from lightning_hybrid.verification.global_batch import global_batch, mean_over_replicas, step_of_global_batch
from lightning_hybrid.verification.steps import Outcome
from lightning_hybrid.verification.whole_step import WholeStep

_BOUND = 1e-4
"""Bound of the relative difference of a loss from the mean over parts of its batch, in single precision; empirical."""


_GATHERED = "the step gathers values of other replicas itself"
_LOSS = "loss as a mean over samples"
_GRADIENTS = "gradients as means over samples"


class Row(NamedTuple):
    """One line of the report."""

    what: str
    result: str
    message: str | None
    """The message of a warning; None if the check has passed."""
    differs: bool = True
    """False if `message` says that the check was not possible."""


class _Compared(NamedTuple):
    """Two results that must be equal."""

    whole: Outcome = Outcome(loss=None, gradients={})  # noqa: RUF009 -- immutable
    """The result of this replica's batch."""
    mean: Outcome = Outcome(loss=None, gradients={})  # noqa: RUF009
    """The mean of the results of its parts."""


class _Gathers(Exception):  # noqa: N818 -- not an error
    """Raised where the user's step gathers values of other replicas."""


class MeanCheck:
    """Checks one step.

    Args:
        step: The step on this replica's batch.
    """

    def __init__(self, step: WholeStep) -> None:
        self._step, self._engine, self._runner = step, step.engine, step.engine.runner

    def run(self, own: Outcome, weight: float, bound: float) -> list[Row]:
        """Returns what was checked. Collective over all ranks.

        Args:
            own: The step on this replica's batch in one process.
            weight: Weight of this replica's batch, 0 if it is padding.
            bound: Bound of relative differences for the precision of the run.
        """
        line = next((found for found in gather_objects(own.acts) if found is not None), None)
        needs_gradients = line is not None or not self._runner.root.automatic_optimization
        parts, problem = equal_parts(self._engine, self._step.args)
        problem = first_problem(problem)
        found = _Compared()
        if problem is None:
            with patched(self._runner.root.trainer.strategy, all_gather=refused_gather):
                found, problem = self._attempt(lambda: self._of_parts(own.loss, parts, needs_gradients))
        if problem is not None:
            return self._rows_of_replicas(own, weight, bound, line, problem)
        on = f"on {len(parts)} parts of the first batch"
        row = self._loss(found, on, bound, weight > 0)
        if line is None or row.message is not None:
            return [row]
        how = f"is the mean over {len(parts)} parts of the first batch"
        return [row, self._gradients(found, bound, partial(self._by_line, line, how), counts=weight > 0)]

    def _rows_of_replicas(self, own: Outcome, weight: float, bound: float, line: str | None, problem: str) -> list[Row]:
        """Compares the mean over replicas with the global batch, where `problem` prevents the check of parts."""
        args, obstacle = global_batch(self._step)
        found = _Compared()
        if obstacle is None:
            found, obstacle = self._attempt(lambda: self._of_global_batch(own, args, weight, stacked=False))
            if problem == _GATHERED and (obstacle is not None or self._loss_difference(found) > mean_bound(bound)):
                # the step may expect a dimension of replicas, which one process does not have
                again, failure = self._attempt(lambda: self._of_global_batch(own, args, weight, stacked=True))
                found, obstacle = (again, None) if failure is None else (found, obstacle)
        if obstacle is None:
            row = self._loss(found, "on the samples of all replicas", bound, counts=True)
            if row.message is not None:
                return [row]
            how = "is that of the samples of all replicas"
            message = self._by_replica if line is None else partial(self._by_line, line, how)
            return [row, self._gradients(found, bound, message)]
        why = problem if problem == obstacle else f"{problem}; {obstacle}"
        silent = own.weight is not None or self._step.shares(1) is not None or self._runner.root.trainer.global_step > 0
        row = self._unchecked(why, silent)
        if line is None:
            return [row]
        found, problem_of_scaled = self._attempt(self._of_scaled_losses)
        if problem_of_scaled is not None:
            return [row, Row(_GRADIENTS, f"not checked: {problem_of_scaled}", None)]
        how = f"is divided by {self._engine.plan.layout.replicas}"
        return [row, self._gradients(found, bound, partial(self._by_line, line, how), counts=weight > 0)]

    def _unchecked(self, why: str, silent: bool) -> Row:
        """Returns the line for a loss that was not checked; `silent` if its weight is given, or training has begun."""
        message = (
            f"{place_of(self._runner.root)}: whether its loss is a mean over samples could not be checked: {why}. If "
            f"it is not, `layout='{self._engine.plan.layout}'` trains otherwise than one process, as "
            "DistributedDataParallel does. Return `{'loss': ..., 'weight': number_of_tokens}` for a mean over tokens."
        )
        return Row(_LOSS, f"not checked: {why}", None if silent else message, differs=False)

    def _of_global_batch(self, own: Outcome, args: tuple, weight: float, *, stacked: bool) -> _Compared:
        whole = step_of_global_batch(self._step, args, stacked=stacked)
        return _Compared(whole, mean_over_replicas(self._step, own, own.weight or weight))

    def _attempt(self, run: Callable[[], _Compared]) -> tuple[_Compared, str | None]:
        """Returns the result of `run`, and why it has failed on any rank, or None. Collective."""
        found, problem = _Compared(), None
        try:
            with patched(self._engine.run, may_communicate=False):
                found = run()
        except _Gathers:
            problem = _GATHERED
        except Exception as error:  # noqa: BLE001 -- of the user's step with a part of the batch
            problem = error_message(error)
        return found, first_problem(problem)

    def _loss(self, found: _Compared, on: str, bound: float, counts: bool) -> Row:
        difference, bound = self._loss_difference(found, counts), mean_bound(bound)
        if difference <= bound:
            return Row(*mean_row(difference, bound), None)
        what = "mean over the samples" if self._step.shares(1) is None else "mean over the tokens"
        message = (
            f"{place_of(self._runner.root)} computes a loss that is not the {what} of its batch: {on} it is off "
            f"by {difference:.2g} of its value. Under `layout='{self._engine.plan.layout}'` each replica "
            "computes it on its own samples, as under DistributedDataParallel, which differs from one process by about "
            'as much. Return `{"loss": ..., "weight": number_of_tokens}` for a mean over tokens, gather the embeddings '
            "of a contrastive loss by `self.all_gather(..., sync_grads=True)`, or use a layout of `tp` and `pp`."
        )
        return Row(_LOSS, f"differs by {difference:.2g} of its value, see the warning", message)

    def _largest(self, found: _Compared, counts: bool) -> tuple[float, str]:
        """Returns the largest relative difference of a gradient on any rank, and its parameter. Collective."""
        mean, whole = found.mean.gradients, found.whole.gradients
        each = differences(mean, whole, dict.fromkeys([*whole, *mean])) if counts else {}
        name = max(each, key=lambda n: each[n], default="")
        own = each.get(name, 0.0)
        return max(gather_objects((own if math.isfinite(own) else math.inf, name)))

    def _gradients(
        self, found: _Compared, bound: float, message: Callable[[float, str], str], counts: bool = True
    ) -> Row:
        """Compares gradients; `message` makes the warning of the largest difference and its parameter."""
        difference, name = self._largest(found, counts)
        if difference <= bound:
            return Row(_GRADIENTS, f"largest relative difference {difference:.1e} (bound {bound:.0e})", None)
        return Row(_GRADIENTS, f"differ by {difference:.2g} of their norm, see the warning", message(difference, name))

    def _by_replica(self, difference: float, name: str) -> str:
        """Returns the warning for gradients that are not those of the global batch, whose loss is right."""
        return (
            f"{place_of(self._runner.root)}: the loss is that of one process on the samples of all replicas, but the "
            f"gradient of `{name}` is off by {difference:.2g} of its norm. Under "
            f"`layout='{self._engine.plan.layout}'` each replica has the gradient of its own samples only, as under "
            "DistributedDataParallel. Gather values by `self.all_gather(..., sync_grads=True)`, without scaling the "
            "loss by the number of ranks, or use a layout of `tp` and `pp`."
        )

    def _by_line(self, line: str, how: str, difference: float, name: str) -> str:
        """Returns the warning for gradients on which `line` acts; `how` says how the loss differs."""
        replicas = self._engine.plan.layout.replicas
        return (
            f"{line} acts on gradients within the backward pass, by their size or by other samples: if the loss {how}, "
            f"the gradient of `{name}` is off by {difference:.2g} of its norm. Under "
            f"`layout='{self._engine.plan.layout}'` it sees the gradients of a mean over the samples of one replica, "
            f"{replicas} times as large as those of one process, as under DistributedDataParallel, which differs from "
            "one process by about as much. Make it proportional to the gradient of each sample, clip the gradients of "
            "weights (`Trainer(gradient_clip_val=...)`), or use a layout of `tp` and `pp`."
        )

    def _loss_difference(self, found: _Compared, counts: bool = True) -> float:
        """Returns the largest relative difference of a loss on any rank. Collective."""
        mean, whole = (0.0 if o.loss is None else float(o.loss) for o in (found.mean, found.whole))
        return self._worst(relative(mean, whole) if counts else 0.0)

    def _worst(self, own: float) -> float:
        worst = torch.tensor(own, dtype=torch.float64, device=self._engine.device).nan_to_num(nan=torch.inf)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return float(worst)

    def _of_parts(self, loss: Tensor | None, parts: list[tuple], gradients: bool) -> _Compared:
        """Returns the results of this replica's batch, and the means of those of its parts by their weights."""
        scale = 1.0 if gradients else None
        step, whole = self._step, [self._step.args]
        mean = step.mean(parts, step.shares(len(parts)) or [1.0] * len(parts), scale)
        if gradients or has_batch_norm(self._runner.root):
            # the parts are compared without statistics of the batch, so the whole has to be, too
            return _Compared(step.mean(whole, [1.0], scale), mean)
        return _Compared(Outcome(loss=loss, gradients={}), mean)

    def _of_scaled_losses(self) -> _Compared:
        """Returns the results of this replica's batch, and those with the loss of its share in the global batch."""
        whole = [self._step.args]
        scaled = self._step.mean(whole, [1.0], 1.0 / self._engine.plan.layout.replicas)
        return _Compared(self._step.mean(whole, [1.0], 1.0), scaled)


def mean_bound(bound: float) -> float:
    """Returns the bound of the difference of a loss from the mean over parts, from that of steps in the precision."""
    return max(_BOUND, bound if bound > bound_of(torch.float32) else 0.0)


def mean_row(difference: float, bound: float) -> tuple[str, str]:
    """Returns the line of the report for a loss that is a mean over samples."""
    return _LOSS, f"relative difference {difference:.1e} (bound {bound:.0e})"


def equal_parts(engine: Engine, args: tuple, ranks: int = 1, unlike: int = 1) -> tuple[list[tuple], str | None]:
    """Returns the arguments of `training_step` for each of the fewest equal parts of its batch, and why there are none.

    Args:
        engine: The engine of the layout.
        args: Arguments of `training_step`, the batch first.
        ranks: The number of parts is a multiple of it if possible, or else a divisor.
        unlike: A number of parts that does not do.
    """
    runner = engine.runner
    if normalizes_by_batch_only(runner.root):
        return [], "the step normalizes by statistics of its batch"
    known = runner.known_samples()
    size = find_samples(args[0], known).count
    if size is None:
        return [], "the batch cannot be split by samples"
    counts = [n for n in range(2, size + 1) if size % n == 0 and n != unlike]
    count = next((n for n in counts if n % ranks == 0), None) or max((n for n in counts if ranks % n == 0), default=0)
    if not count:
        return [], "a replica has one sample" if size == 1 else f"a replica has {size} samples"
    return [(part, *args[1:]) for part in split_batch(args[0], count, known)], None


def refused_gather(*_: Any, **__: Any) -> None:
    """Takes the place of `all_gather`, which depends on the batches of other replicas."""
    raise _Gathers
