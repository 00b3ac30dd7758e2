"""Checks that the loss of a step is the mean over samples, or over tokens: the mean of the losses of parts of a batch.

Replicas average their gradients by that rule, so the mean over replicas is the gradient of one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.batches import find_samples, split_batch
from lightning_hybrid.collectives import error_message, first_problem
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.loss_weights import place_of
from lightning_hybrid.parallelize.whole import Weights
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas.batch_norm import has_batch_norm, normalizes_by_batch_only
from lightning_hybrid.verification.compare import bound_of, relative
from lightning_hybrid.verification.steps import Conditions, losses_in_one_process, mean_of

_BOUND = 1e-4
"""Bound of the relative difference of a loss from the mean over parts of its batch, in single precision; empirical."""


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

    def run(self, loss: Tensor | None, bound: float, counts: bool) -> tuple[str, str | None]:
        """Returns the result as text, and a message if the loss is not the mean. Collective over all ranks.

        Args:
            loss: The loss of this replica's batch in one process.
            bound: Bound of relative differences for the precision of the run.
            counts: False if this replica's batch is padding.
        """
        parts, problem = self._equal_parts()
        problem = first_problem(problem)
        if problem is None:
            try:
                with patched(self._runner.root.trainer.strategy, all_gather=_refused_gather):
                    whole, losses = self._losses(loss, parts)
            except _Gathers:
                problem = "the step gathers values of other replicas itself"
            except Exception as error:  # noqa: BLE001 -- of the user's step with a part of the batch
                problem = error_message(error)
            problem = first_problem(problem)
        if problem is not None:
            return f"not checked: {problem}", None
        mean = mean_of(losses)
        own = relative(*(0.0 if x is None else float(x) for x in (mean, whole))) if counts else 0.0
        worst = torch.tensor(own, dtype=torch.float64, device=self._engine.device).nan_to_num(nan=torch.inf)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        difference, bound = float(worst), max(_BOUND, bound if bound > bound_of(torch.float32) else 0.0)
        if difference <= bound:
            return f"relative difference {difference:.1e} (bound {bound:.0e})", None
        return f"differs by {difference:.1%}, see the warning", self._message(difference, len(parts))

    def _message(self, difference: float, parts: int) -> str:
        mean = "mean over the samples" if self._shares(1) is None else "mean over the tokens"
        return (
            f"{place_of(self._runner.root)} computes a loss that is not the {mean} of its batch: on {parts} parts of "
            f"the first batch it is off by {difference:.1%}. Under `layout='{self._engine.plan.layout}'` each replica "
            "computes it on its own samples, as under DistributedDataParallel, which differs from one process by about "
            'as much. Return `{"loss": ..., "weight": number_of_tokens}` for a mean over tokens, gather the embeddings '
            "of a contrastive loss by `self.all_gather(..., sync_grads=True)`, or use a layout of `tp` and `pp`."
        )

    def _losses(self, loss: Tensor | None, parts: list[tuple]) -> tuple[Tensor | None, list[tuple[Tensor, float]]]:
        """Returns the loss of this replica's batch, and those of its parts with their weights."""
        shares = self._shares(len(parts)) or [1.0] * len(parts)
        if not has_batch_norm(self._runner.root):
            return loss, self._losses_of(parts, shares)
        # the parts are compared without statistics of the batch, so the whole has to be, too
        (whole, _), *losses = self._losses_of([self._args, *parts], [1.0, *shares])
        return whole, losses

    def _losses_of(self, batches: list[tuple], shares: list[float]) -> list[tuple[Tensor, float]]:
        return losses_in_one_process(self._runner, self._weights, batches, self._kwargs, self._how, shares)

    def _shares(self, parts: int) -> list[float] | None:
        """Returns the weights of parts of the batch by tokens, if the data says how many; None: by samples."""
        weights = self._engine.run.data.batch_weights()
        return None if weights is None or weights.tokens is None else weights.tokens.weights(parts)

    def _equal_parts(self) -> tuple[list[tuple], str | None]:
        if normalizes_by_batch_only(self._runner.root):
            return [], "the step normalizes by statistics of its batch"
        known = self._runner.known_samples()
        size = find_samples(self._args[0], known).count
        if size is None:
            return [], "the batch cannot be split by samples"
        count = next((n for n in range(2, size + 1) if size % n == 0), 0)
        if not count:
            return [], "a replica has one sample"
        return [(part, *self._args[1:]) for part in split_batch(self._args[0], count, known)], None


def _refused_gather(*_: Any, **__: Any) -> None:
    raise _Gathers
