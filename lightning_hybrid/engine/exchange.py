"""The only all-reduce of a step, which carries all small values that every rank needs, and its only host read."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.engine.batch_kinds import BatchKinds
from lightning_hybrid.launch.world import World
from lightning_hybrid.metrics.reduction import as_numbers
from lightning_hybrid.metrics.step_logs import StepLogs
from lightning_hybrid.replicas.missing import MissingGradients
from lightning_hybrid.replicas.order import CollectiveOrder


class StepExchange:
    """Sums numbers over all ranks: those of the caller, flags to stop, missing gradients, and pending logs.

    Another all-reduce would make the ranks wait for each other, and another read the host for its device.

    Args:
        device: This rank's device.
        logs: The logs of the running step.
        world: The connected ranks, with this rank's record of a SIGTERM and of `trainer.should_stop`.
        missing: Gradients of weights that some replicas do not use; None: weights are not sharded.
        order: The order of collectives.
    """

    def __init__(
        self,
        device: torch.device,
        logs: StepLogs,
        world: World,
        missing: MissingGradients | None,
        order: CollectiveOrder,
    ) -> None:
        self._device, self.logs, self._missing, self._order = device, logs, missing, order
        self._preemption, self._stopping = world.preemption, world.stopping
        self.check_follows = False
        """True if logs of the running step can wait for the check of its gradients."""
        self.kinds: BatchKinds | None = None
        """Kinds of values of batches; None: not noted."""

    def saw_loss(self, loss: Tensor) -> None:
        """Notes the operations that lead to a loss of the running step."""
        if self.kinds is not None:
            self.kinds.saw_loss(loss)

    def run(self, numbers: Tensor | None = None) -> tuple[list[float], Tensor]:
        """Sums `numbers` over all ranks, and replays pending logs. Collective.

        Args:
            numbers: float64 on this rank's device, of the same length on all ranks.

        Returns:
            The sums, on the host and on the device.
        """
        own = as_numbers([], self._device) if numbers is None else numbers
        if dist.get_world_size() == 1:
            return own.tolist(), own
        self._order.next("has run a step")
        missing = self._missing.count if self._missing is not None else 0
        flags = [float(self._preemption.requested), float(self._stopping.requested), float(missing)]
        kinds = [] if self.kinds is None else [self.kinds.numbers()]
        buffer = torch.cat([as_numbers(flags, self._device), own, *kinds, *self.logs.numbers()])
        dist.all_reduce(buffer)
        on_host, kinds_at = buffer.tolist(), len(flags) + len(own)
        logs_at = kinds_at + sum(map(len, kinds))
        if self.kinds is not None:
            self.kinds.hear(on_host[kinds_at:logs_at])
        self._preemption.hear(on_host[0] > 0)
        self._stopping.hear(on_host[1] > 0)
        if self._missing is not None:
            self._missing.settle() if on_host[2] > 0 else self._missing.forget()
        if self.logs.pending:
            self.logs.take_sums(buffer[logs_at:], on_host[logs_at:])
        return on_host[len(flags) : kinds_at], buffer[len(flags) : kinds_at]
