"""Checks that the loss of a step is the mean over samples, or over tokens: the mean of the losses of parts of a batch.

Replicas average their gradients by that rule, so the mean over replicas is the gradient of one process. Where user code
acts on gradients within the backward pass, gradients are compared by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.batches import find_samples, split_batch
from lightning_hybrid.collectives import error_message, first_problem, gather_objects
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.loss_weights import place_of
from lightning_hybrid.parallelize.whole import Weights
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas.batch_norm import has_batch_norm, normalizes_by_batch_only
from lightning_hybrid.verification.differences import bound_of, differences, relative
from lightning_hybrid.verification.steps import Conditions, Outcome, mean_in_one_process

_BOUND = 1e-4
"""Bound of the relative difference of a loss from the mean over parts of its batch, in single precision; empirical."""


_LOSS = "loss as a mean over samples"
_GRADIENTS = "gradients as means over samples"


class Row(NamedTuple):
    """One line of the report."""

    what: str
    result: str
    message: str | None
    """The message of a warning; None if the check has passed, or was not possible."""


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
        engine: The engine of the layout.
        weights: The whole weights.
        args: Arguments of `training_step`, the batch first.
        kwargs: Keyword arguments of `training_step`.
        how: The conditions of the steps that run.
    """

    def __init__(self, engine: Engine, weights: Weights, args: tuple, kwargs: dict[str, Any], how: Conditions) -> None:
        self._engine, self._runner, self._weights = engine, engine.runner, weights
        self._args, self._kwargs, self._how = args, kwargs, how

    def run(self, loss: Tensor | None, acts: str | None, bound: float, counts: bool) -> list[Row]:
        """Returns what was checked. Collective over all ranks.

        Args:
            loss: The loss of this replica's batch in one process.
            acts: A line of the user's code that acts on gradients within the backward pass, if there is one.
            bound: Bound of relative differences for the precision of the run.
            counts: False if this replica's batch is padding.
        """
        line = next((found for found in gather_objects(acts) if found is not None), None)
        needs_gradients = line is not None or not self._runner.root.automatic_optimization
        parts, problem = equal_parts(self._engine, self._args)
        problem = first_problem(problem)
        if problem is None:
            found, problem = self._attempt(lambda: self._of_parts(loss, parts, needs_gradients))
        if problem is not None:
            row = Row(_LOSS, f"not checked: {problem}", None)
            if line is None:
                return [row]
            found, problem = self._attempt(self._of_scaled_losses)
            if problem is not None:
                return [row, Row(_GRADIENTS, f"not checked: {problem}", None)]
            return [row, self._gradients(found, line, None, bound, counts)]
        row = self._loss(found, len(parts), bound, counts)
        if line is None or row.message is not None:
            return [row]
        return [row, self._gradients(found, line, len(parts), bound, counts)]

    def _attempt(self, run: Callable[[], _Compared]) -> tuple[_Compared, str | None]:
        """Returns the result of `run`, and why it has failed on any rank, or None. Collective."""
        found, problem = _Compared(), None
        try:
            with patched(self._runner.root.trainer.strategy, all_gather=refused_gather):
                found = run()
        except _Gathers:
            problem = "the step gathers values of other replicas itself"
        except Exception as error:  # noqa: BLE001 -- of the user's step with a part of the batch
            problem = error_message(error)
        return found, first_problem(problem)

    def _loss(self, found: _Compared, parts: int, bound: float, counts: bool) -> Row:
        mean, whole = (0.0 if o.loss is None else float(o.loss) for o in (found.mean, found.whole))
        own = relative(mean, whole) if counts else 0.0
        difference, bound = self._worst(own), mean_bound(bound)
        if difference <= bound:
            return Row(*mean_row(difference, bound), None)
        what = "mean over the samples" if self._shares(1) is None else "mean over the tokens"
        message = (
            f"{place_of(self._runner.root)} computes a loss that is not the {what} of its batch: on {parts} parts of "
            f"the first batch it is off by {difference:.1%}. Under `layout='{self._engine.plan.layout}'` each replica "
            "computes it on its own samples, as under DistributedDataParallel, which differs from one process by about "
            'as much. Return `{"loss": ..., "weight": number_of_tokens}` for a mean over tokens, gather the embeddings '
            "of a contrastive loss by `self.all_gather(..., sync_grads=True)`, or use a layout of `tp` and `pp`."
        )
        return Row(_LOSS, f"differs by {difference:.1%}, see the warning", message)

    def _gradients(self, found: _Compared, line: str, parts: int | None, bound: float, counts: bool) -> Row:
        mean, whole = found.mean.gradients, found.whole.gradients
        each = differences(mean, whole, dict.fromkeys([*whole, *mean])) if counts else {}
        name = max(each, key=lambda n: each[n], default="")
        own = each.get(name, 0.0)
        difference, name = max(gather_objects((own if math.isfinite(own) else math.inf, name)))
        if difference <= bound:
            return Row(_GRADIENTS, f"largest relative difference {difference:.1e} (bound {bound:.0e})", None)
        replicas = self._engine.plan.layout.replicas
        how = f"is divided by {replicas}" if parts is None else f"is the mean over {parts} parts of the first batch"
        message = (
            f"{line} acts on gradients within the backward pass, by their size or by other samples: if the loss {how}, "
            f"the gradient of `{name}` is off by {difference:.1%}. Under `layout='{self._engine.plan.layout}'` it sees "
            f"the gradients of a mean over the samples of one replica, {replicas} times as large as those of one "
            "process, as under DistributedDataParallel, which differs from one process by about as much. Make it "
            "proportional to the gradient of each sample, clip the gradients of weights "
            "(`Trainer(gradient_clip_val=...)`), or use a layout of `tp` and `pp`."
        )
        return Row(_GRADIENTS, f"differ by {difference:.1%}, see the warning", message)

    def _worst(self, own: float) -> float:
        worst = torch.tensor(own, dtype=torch.float64, device=self._engine.device).nan_to_num(nan=torch.inf)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return float(worst)

    def _of_parts(self, loss: Tensor | None, parts: list[tuple], gradients: bool) -> _Compared:
        """Returns the results of this replica's batch, and the means of those of its parts by their weights."""
        scale = 1.0 if gradients else None
        mean = self._mean(parts, self._shares(len(parts)) or [1.0] * len(parts), scale)
        if gradients or has_batch_norm(self._runner.root):
            # the parts are compared without statistics of the batch, so the whole has to be, too
            return _Compared(self._mean([self._args], [1.0], scale), mean)
        return _Compared(Outcome(loss=loss, gradients={}), mean)

    def _of_scaled_losses(self) -> _Compared:
        """Returns the results of this replica's batch, and those with the loss of its share in the global batch."""
        scaled = self._mean([self._args], [1.0], 1.0 / self._engine.plan.layout.replicas)
        return _Compared(self._mean([self._args], [1.0], 1.0), scaled)

    def _mean(self, batches: list[tuple], shares: list[float], scale: float | None) -> Outcome:
        runner, weights = self._runner, self._weights
        return mean_in_one_process(runner, weights, batches, self._kwargs, self._how, shares, scale=scale)

    def _shares(self, parts: int) -> list[float] | None:
        """Returns the weights of parts of the batch by tokens, if the data says how many; None: by samples."""
        weights = self._engine.run.data.batch_weights()
        return None if weights is None or weights.tokens is None else weights.tokens.weights(parts)


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
