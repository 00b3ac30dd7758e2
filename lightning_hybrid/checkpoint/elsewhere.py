"""Checkpoint folders that torch or plain Lightning is to open: the error names what makes a single file of them.

Both fail with `IsADirectoryError`. In a process that has imported `HybridStrategy`, their functions check for a
checkpoint folder first; elsewhere the file `README.txt` in the folder says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import lightning.fabric.utilities.cloud_io
import lightning_fabric.utilities.cloud_io
import torch

from lightning_hybrid.checkpoint.files import MANIFEST
from lightning_hybrid.spec.errors import CheckpointError


def name_the_remedy() -> None:
    """Makes `torch.load` and plain Lightning raise a CheckpointError for checkpoint folders."""
    torch.load = torch.serialization.load = _checked(torch.load)
    modules: tuple[Any, ...] = (lightning.fabric.utilities.cloud_io, lightning_fabric.utilities.cloud_io)
    for module in modules:
        module.get_filesystem = _checked(module.get_filesystem)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str | Path) and (Path(args[0]) / MANIFEST).is_file():
            raise CheckpointError(
                f"{args[0]} is the folder of a checkpoint that `HybridStrategy` has saved; torch and plain Lightning "
                f"read single files. Make one with `lightning-hybrid consolidate {args[0]} OUT`. A Trainer with "
                "`HybridStrategy` reads the folder, in any layout."
            )
        return function(*args, **kwargs)

    return checked
