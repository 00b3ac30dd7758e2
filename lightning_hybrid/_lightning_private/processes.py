"""Processes and process groups as Lightning makes and uses them."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _call_and_handle_interrupt
from lightning.pytorch.trainer.connectors import accelerator_connector
from pytorch_lightning.trainer.connectors import accelerator_connector as other_accelerator_connector
from torch import Tensor

from lightning_hybrid._lightning_private.packages import of_package

SubprocessScriptLauncher = _SubprocessScriptLauncher
MultiProcessingLauncher = _MultiProcessingLauncher


def is_interactive() -> bool:
    """Returns True in a notebook, or at the prompt of Python."""
    return _IS_INTERACTIVE


def forget_prompt() -> None:
    """Makes this process, forked from a notebook or a prompt, one that a launcher has started."""
    global _IS_INTERACTIVE
    _IS_INTERACTIVE = False
    for connector in (accelerator_connector, other_accelerator_connector):
        connector._IS_INTERACTIVE = False  # type: ignore[attr-defined] -- imported there


def can_start_again() -> bool:
    """Returns True if this program is a script or a module, which Lightning can start again for each further rank.

    Code of `python -c` and of the standard input, and a script that has been removed, cannot be started again.
    """
    program = sys.modules.get("__main__")
    return getattr(program, "__spec__", None) is not None or os.path.exists(sys.argv[0])


def run_as_trainer_does(trainer: pl.Trainer, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Runs `function` by the launcher of the strategy, and ends the run as `trainer.fit` does if it raises."""
    return of_package(trainer, _call_and_handle_interrupt)(trainer, function, *args, **kwargs)


@contextmanager
def exit_functions_of_fork() -> Iterator[None]:
    """Forgets the exit functions of the parent process, and runs those of the context, as Python does from 3.13 on."""
    atexit._clear()
    try:
        yield
    finally:
        atexit._run_exitfuncs()


def set_launcher(strategy: Any, launcher: Any) -> None:
    """Replaces the launcher of a strategy whose processes run already."""
    strategy._launcher = launcher


def loops_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the progress of the trainer's loops, as in a checkpoint."""
    return trainer._checkpoint_connector._get_loops_state_dict()


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
