"""The context of one step, created when the step begins and passed down."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss whose gradient this replica contributes. The only place where `loss_factor` is applied."""
        return loss if self.weights is None else loss * self.loss_factor
