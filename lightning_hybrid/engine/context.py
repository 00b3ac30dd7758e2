"""The context of one step, created when the step begins and passed down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_hybrid.dataloader.sharding import BatchWeights
from lightning_hybrid.metrics.logs import LogRecorder


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The context of one training or evaluation step on this rank."""

    name: str
    """`training_step`, `validation_step`, `test_step` or `predict_step`."""
    recorder: LogRecorder
    """Recorder of the values that the step logs."""
    weights: BatchWeights | None = None
    """Batch weights: the number of samples of each replica; None if all replicas have the same number."""
    loss_factor: float = 1.0
    """Factor on this replica's loss with which the mean over replicas is the mean over the global batch."""
    padding: bool = False
    """True if the samples of this replica are padding, which does not affect results."""

    weight_unit: float = 1.0
    """About the weight of a batch, u in `engine.loss_weights`."""
    loss_weights: Sequence[float] | None = None
    """Weight that the step has returned with its loss, by microbatch; None if it has returned none."""

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss whose gradient this replica contributes. The only place where `loss_factor` is applied."""
        if self.loss_factor == 0.0:
            return without_gradient(loss)
        return loss if self.weights is None and self.loss_weights is None else loss * self.loss_factor

    def weighted(self, weights: Sequence[float]) -> Self:
        """Returns the context of the same step with the weights that it has returned, by microbatch.

        These replace the numbers of samples.
        """
        weights = [0.0] * len(weights) if self.padding else weights
        return replace(self, loss_weights=weights, loss_factor=sum(weights) / self.weight_unit)


def without_gradient(loss: Tensor) -> Tensor:
    """Returns 0, whose backward pass runs as that of `loss` and computes gradients of 0, also where `loss` is NaN."""
    if loss.grad_fn is not None and not bool(torch.isfinite(loss)):
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            if node.next_functions:  # else the node adds to the gradient of a parameter
                node.register_hook(_zeros)
    return torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0.0


def _zeros(inputs: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in inputs)
