"""Running a user's step without leaving a trace: module state and random streams are put back afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

_COPIED = (dict, list, set)


@contextmanager
def random_streams_kept(device: torch.device | None = None) -> Iterator[None]:
    """The random generators of Python, NumPy and torch (CPU and `device`) are afterwards as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def module_state_kept(root: nn.Module) -> Iterator[None]:
    """Attributes, containers (one level deep) and tensors of every submodule are afterwards as they were before."""
    attributes: list[tuple[dict, dict]] = []
    containers: list[tuple[Any, Any]] = []
    tensors: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
    for module in root.modules():
        attributes.append((module.__dict__, dict(module.__dict__)))
        for value in module.__dict__.values():
            if type(value) in _COPIED or isinstance(value, dict):
                containers.append((value, value.copy()))
        for tensor in [*module._buffers.values(), *module.__dict__.values()]:
            # exact type: subclasses (ghosts, DTensors) have no plain storage, and parameters are not written by a step
            if type(tensor) is torch.Tensor and id(tensor) not in tensors and not tensor.requires_grad:
                tensors[id(tensor)] = (tensor, tensor._version, tensor.detach().clone())
    try:
        yield
    finally:
        for current, saved in attributes:
            current.clear()
            current.update(saved)
        for value, saved in containers:
            value.clear()
            value.extend(saved) if isinstance(value, list) else value.update(saved)
        with torch.no_grad():
            for tensor, version, saved in tensors.values():
                if tensor._version != version:
                    tensor.copy_(saved)
