"""Loss weights: the gradient of a step that returns `{"loss": ..., "weight": number of tokens}`.

With loss l_i and weight w_i of microbatch i, over the microbatches of all replicas and accumulated batches, the
gradient of an optimizer step is that of the mean over tokens:

    sum_i w_i grad(l_i) / sum_i w_i.

The sum of the weights is known after the last backward pass only. Each backward pass therefore computes the gradient of
m w_i / u l_i (`StepContext.weighted`), where m is the number of microbatches and u about the weight of a batch, so that
gradients of float16 stay in range. Lightning divides by the A accumulated batches, the schedule by m, the reduction
by the R replicas. `finish` multiplies the complete gradients by A R u / sum_i w_i.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._lightning_private import steps_after_batch
from lightning_hybrid.batches import count_tokens
from lightning_hybrid.collectives import to_local
from lightning_hybrid.engine.context import StepContext
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.spec.errors import PartitionError

WEIGHT = "weight"
"""Key of the weight in what a step returns."""
BY_MICROBATCH = "_hybrid_weights"
"""Key of the weights of microbatches in what the last stage sends to the other stages."""


def loss_of(out: Any) -> Any:
    """Returns the loss in what a step has returned; None if it has returned none."""
    return out.get("loss") if isinstance(out, Mapping) else out


def weight_of(out: Any) -> float | None:
    """Returns the weight that a step has returned; None if it has returned no single number under that key.

    Raises:
        PartitionError: If the weight is negative or not finite.
    """
    value = out.get(WEIGHT) if isinstance(out, Mapping) else None
    if isinstance(value, Tensor):
        value = value.detach().item() if value.numel() == 1 else None
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    weight = float(value)
    if not math.isfinite(weight) or weight < 0:
        raise PartitionError(
            f"`weight`, which a step returns with its loss, must be 0 or a positive number. Got {weight}."
        )
    return weight


class LossWeights:
    """Collects the weights of the batches of an optimizer step, and divides the complete gradients by their sum.

    Args:
        root: The LightningModule.
        mesh: The mesh.
        device: This rank's device.
    """

    def __init__(self, root: pl.LightningModule, mesh: Mesh, device: torch.device) -> None:
        self._root, self._mesh, self._device = root, mesh, device
        self._unit: float | None = None
        self._used: bool | None = None
        self._sum: float | None = None
        """Sum of this replica's weights since the last step of the optimizer; None if batches have no weights."""

    def reset(self) -> None:
        """Forgets the weights of accumulated batches, at the start of a run."""
        self._sum = None

    def unit(self, batch: Any) -> float:
        """Returns u: about the weight of a batch, equal on all ranks. Collective over replicas at the first call."""
        if self._unit is None:
            tokens = torch.tensor(float(count_tokens(batch) or 1), dtype=torch.float64, device=self._device)
            if self._mesh.layout.replicas > 1:
                dist.all_reduce(tokens, group=self._mesh.log_group)
            self._unit = float(tokens) / self._mesh.layout.replicas or 1.0
        return self._unit

    def take(self, context: StepContext, any_rank: Callable[[bool], bool]) -> None:
        """Adds the weights of a training batch. Collective over all ranks at the first call.

        Args:
            context: The context of the step that has run.
            any_rank: Returns True if its argument is True on any rank.

        Raises:
            PartitionError: If other steps, or other replicas, do not have weights.
        """
        weights = context.loss_weights
        if self._used is None:
            some, others = any_rank(weights is not None), any_rank(weights is None)
            if some and others:
                raise _missing(self._root)
            self._used = some
        if self._used != (weights is not None):
            raise _missing(self._root)
        if weights is not None:
            self._sum = (self._sum or 0.0) + sum(weights)

    def finish(self, parameters: Iterable[Tensor]) -> None:
        """Divides complete gradients by the sum of weights, after the last backward pass. Collective over replicas."""
        trainer = self._root.trainer
        if self._sum is None or not steps_after_batch(trainer):
            return
        total = torch.tensor(self._sum, dtype=torch.float64, device=self._device)
        self._sum = None
        replicas = self._mesh.layout.replicas
        if replicas > 1:
            dist.all_reduce(total, group=self._mesh.log_group)
        # without any token, gradients are 0 already
        factor = torch.where(total > 0, trainer.accumulate_grad_batches * replicas * (self._unit or 1.0) / total, 1.0)
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    own = to_local(parameter.grad)
                    own.mul_(factor.to(own.device, own.dtype if own.dtype.itemsize > 2 else torch.float32))


def check_weights(root: pl.LightningModule, *, diloco: bool, noise: bool) -> None:
    """Refuses weights where the gradients of a step cannot be divided by their sum.

    Args:
        root: The LightningModule, whose step has returned a weight.
        diloco: Whether replicas step independently.
        noise: Whether the gradient noise is measured.

    Raises:
        PartitionError: In these cases, and if the module optimizes manually.
    """
    reason = None
    if not root.automatic_optimization:
        reason = (
            "the module optimizes manually, so its gradients are used before the weight is known. Multiply the loss"
        )
        reason += " by the weight and divide by the sum over replicas, `self.trainer.strategy.reduce(weight)`"
    elif diloco:
        reason = "with `gradient_sync='diloco'` replicas step by themselves, so there is no common batch. Use 'exact'"
    elif noise:
        reason = (
            "`AdaptiveBatchSize` measures the noise of gradients that are weighted by samples. Leave the callback out"
        )
    if reason is not None:
        raise PartitionError(f"{place_of(root)} returns a `weight` with its loss, but {reason}, or return no `weight`.")


def mean_loss(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns the mean of microbatches' losses by weight; without any weight, the mean of all."""
    if not any(weights):
        return torch.stack(list(losses)).mean()
    return torch.stack([loss * w for loss, w in zip(losses, weights, strict=True) if w]).sum() / sum(weights)


def weights_of_parts(root: pl.LightningModule, weights: Mapping[int, float], count: int) -> list[float]:
    """Returns the weights of `count` microbatches in order.

    Raises:
        PartitionError: If some have none.
    """
    if len(weights) < count:
        raise _missing(root)
    return [weights[i] for i in range(count)]


def with_weights(returned: Mapping[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """Returns what a step has returned besides the loss, with the sum of its weights, and each by microbatch."""
    total = returned[WEIGHT]
    total = torch.full_like(total, sum(weights)) if isinstance(total, Tensor) else sum(weights)
    return {**returned, WEIGHT: total, BY_MICROBATCH: list(weights)}


def _missing(root: pl.LightningModule) -> PartitionError:
    return PartitionError(
        f"{place_of(root)} returns a `weight` with the loss of some batches, and of others none. Return it with every "
        "batch and on every replica, 0 for a batch without tokens."
    )


def place_of(root: pl.LightningModule) -> str:
    """Returns the name and the place of a module's `training_step`."""
    code = getattr(inspect.unwrap(type(root).training_step), "__code__", None)
    place = "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"
    return f"`{type(root).__name__}.training_step`{place}"
