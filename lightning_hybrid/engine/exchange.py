"""The one all-reduce of a step, which carries everything small that all ranks have to know, and its one read."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.launch.preemption import Preemption
from lightning_hybrid.metrics.reduction import as_numbers
from lightning_hybrid.metrics.step_logs import StepLogs


class StepExchange:
    """Adds up numbers over all ranks: those of the caller, the note of a SIGTERM, and the logs that wait.

    Every further all-reduce would make the ranks wait for each other, and every further read the host for its device.

    Args:
        device: This rank's device.
        logs: The logs of the running step.
    """

    def __init__(self, device: torch.device, logs: StepLogs) -> None:
        self._device, self.logs = device, logs
        self.preemption: Preemption | None = None
        """This rank's note of a SIGTERM; takes those of the others."""
        self.check_follows = False
        """Whether logs of the running step can wait for the check of its gradients."""

    def run(self, numbers: Tensor | None = None) -> tuple[list[float], Tensor]:
        """Adds up `numbers` over all ranks, and replays the logs that wait; collective.

        Args:
            numbers: float64 on this rank's device, of the same length on all ranks.

        Returns:
            The sums, on the host and on the device.
        """
        own = as_numbers([], self._device) if numbers is None else numbers
        if dist.get_world_size() == 1:
            return own.tolist(), own
        requested = self.preemption is not None and self.preemption.requested
        buffer = torch.cat([as_numbers([float(requested)], self._device), own, *self.logs.numbers()])
        dist.all_reduce(buffer)
        on_host, logs_at = buffer.tolist(), 1 + len(own)
        if self.preemption is not None:
            self.preemption.hear(on_host[0] > 0)
        if self.logs.pending:
            self.logs.take_sums(buffer[logs_at:], on_host[logs_at:])
        return on_host[1:logs_at], buffer[1:logs_at]
