"""Processes and process groups as Lightning makes and uses them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor

SubprocessScriptLauncher = _SubprocessScriptLauncher


def default_backend(device: torch.device) -> str:
    """Returns the backend of the default process group for a device."""
    return _get_default_process_group_backend_for_device(device)


def init_process_group(
    environment: ClusterEnvironment, backend: str, timeout: timedelta | None, device: torch.device | None
) -> None:
    """Makes the default process group of the ranks of `environment`."""
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device)


def reduce_tensor(tensor: Tensor, group: Any, operation: Any) -> Tensor:
    """Reduces a tensor as Lightning's strategies do."""
    return _sync_ddp_if_available(tensor, group, reduce_op=operation)
