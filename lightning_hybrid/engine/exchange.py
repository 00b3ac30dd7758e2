"""The only all-reduce of a step, which carries all small values that every rank needs, and its only host read."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.launch.preemption import Preemption
from lightning_hybrid.metrics.reduction import as_numbers
from lightning_hybrid.metrics.step_logs import StepLogs


class StepExchange:
    """Sums numbers over all ranks: those of the caller, the SIGTERM flag, and pending logs.

    Another all-reduce would make the ranks wait for each other, and another read the host for its device.

    Args:
        device: This rank's device.
        logs: The logs of the running step.
        preemption: This rank's record of a SIGTERM.
    """

    def __init__(self, device: torch.device, logs: StepLogs, preemption: Preemption) -> None:
        self._device, self.logs, self._preemption = device, logs, preemption
        self.check_follows = False
        """True if logs of the running step can wait for the check of its gradients."""

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
        requested = as_numbers([float(self._preemption.requested)], self._device)
        buffer = torch.cat([requested, own, *self.logs.numbers()])
        dist.all_reduce(buffer)
        on_host, logs_at = buffer.tolist(), 1 + len(own)
        self._preemption.hear(on_host[0] > 0)
        if self.logs.pending:
            self.logs.take_sums(buffer[logs_at:], on_host[logs_at:])
        return on_host[1:logs_at], buffer[1:logs_at]
