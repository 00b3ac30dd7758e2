"""Measures how much the loss and the gradients of steps differ, on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.parallelize.whole import Weights
from lightning_hybrid.verification.differences import Differences, differences, mean_over, relative
from lightning_hybrid.verification.effects import on_any_rank
from lightning_hybrid.verification.steps import Outcome


class StepDifferences:
    """Compares steps by their loss and gradients.

    Args:
        engine: The engine of the layout.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._partition = engine, engine.partition
        self.weight = _weight(engine)
        """Weight of this replica's batch in the mean over replicas."""

    def from_process(
        self, under: Outcome, whole: Outcome, weights: Weights, group: dist.ProcessGroup | None = None
    ) -> Differences:
        """Compares the step under the layout with the mean of steps in one process. Collective.

        Args:
            under: The step under the layout.
            whole: The step of this rank in one process.
            weights: The whole weights.
            group: The ranks whose steps make the global batch; None: those of other replicas.
        """
        partition, group = self._partition, group or self._engine.mesh.replica_group
        names = partition.parameters.names
        scale = _scale_of(self._engine)
        own = self.weight if under.weight is None or whole.weight is None else whole.weight
        weight = torch.tensor(own, dtype=torch.float64, device=self._engine.device)
        dist.all_reduce(weight, group=group)
        if under.weight is not None:
            scale *= self._engine.plan.layout.replicas / (float(weight) or 1.0)
        made, wanted = on_any_rank(self._engine, *([_has(o.gradients, n) for n in names] for o in (under, whole)))
        stage = self._engine.mesh.rank("pp")
        found = {n: self._found(n, under) * scale for n in made if partition.plan.ranks_of(n)[0] == stage}
        expected = {n: _or_zero(whole.gradients[n], weights.values[n]) for n in wanted}
        if self._engine.diloco is None:  # else replicas keep their own gradients
            expected = mean_over(group, expected, own / (float(weight) or 1.0))
        here = [n for n in wanted if n not in made] + list(found)
        gradients = dict.fromkeys([*made, *wanted], 0.0) | differences(found, expected, here)
        return self._worst(under.loss, whole.loss, gradients)

    def of_processes(self, one: Outcome, other: Outcome) -> Differences:
        """Compares two steps of this rank in one process; returns the largest differences of all ranks. Collective."""
        return self._worst(one.loss, other.loss, differences(one.gradients, other.gradients, other.gradients))

    def _found(self, name: str, under: Outcome) -> Tensor:
        """Returns the whole gradient of a parameter of this rank's stage. Collective over the ranks that hold it."""
        parameter = self._partition.parameters[name]
        return self._partition.gathered(name, _or_zero(under.gradients.get(name), parameter))

    def _worst(self, found: Tensor | None, expected: Tensor | None, gradients: dict[str, float]) -> Differences:
        """Returns the largest of each difference over all ranks. Collective."""
        a, b = (0.0 if x is None else float(x) for x in (found, expected))
        loss = relative(a, b) if self.weight else 0.0  # the loss of padding counts for nothing
        values = torch.tensor([loss, *gradients.values()], dtype=torch.float64, device=self._engine.device)
        values = values.nan_to_num(nan=torch.inf)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        loss, *worst = values.tolist()
        return Differences(loss, a, b, dict(zip(gradients, worst, strict=True)))


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _has(gradients: Mapping[str, Tensor | None], name: str) -> bool:
    return gradients.get(name) is not None


def _weight(engine: Engine) -> float:
    """Returns the weight of this replica's batch in the mean over replicas: its tokens, or samples, or 1."""
    weights, replica = engine.run.data.batch_weights(), engine.mesh.replica
    if weights is None:
        return 1.0
    return float((weights.counts if weights.tokens is None else weights.tokens.counts)[replica])


def _scale_of(engine: Engine) -> float:
    """Returns the factor that undoes accumulation and loss scaling, which a pipeline applies in its schedule.

    Gradients in the user's `backward` have the factor of the loss there, which has not been scaled.
    """
    if engine.runner.pipeline is None or engine.runner.gradients.users_backward:
        return 1.0
    scaler = getattr(engine.run.precision, "scaler", None)
    scale = 1.0 if scaler is None else scaler.get_scale()
    return engine.root.trainer.accumulate_grad_batches / scale
