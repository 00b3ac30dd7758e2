"""Compares what objects were like before a run and after it.

A `Snapshot` lists the attributes of every object that given roots lead to. `texts` describes each attribute, so that
the ends of two runs (Lightning's own and ours) can be compared with each other.
"""

from __future__ import annotations

import atexit
import enum
import gc
import os
import re
import signal
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
import torch.utils.checkpoint
import torchmetrics
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.module import _WrappedHook
from torch.optim import Optimizer

ABSENT = "absent"
"""The text of an attribute that is not there."""

_OPENED = ("lightning", "torch.nn", "torch.optim", "torch.utils.data", "torchmetrics", "tests")
"""Packages whose objects are looked into; of all others only the class is noted."""
_PLAIN = (int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.Size, Path)
_TABLES = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Snapshot:
    """The attributes of all objects that `roots` lead to.

    Args:
        roots: Objects by name.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self.paths: dict[int, str] = {id(value): name for name, value in roots.items()}
        """Of every object that is no plain value, where it was found first."""
        self.values: dict[str, Any] = {}
        """By path; keeps the objects alive, so that their ids stay theirs."""
        for name, root in roots.items():
            ahead = deque([(name, root)])
            while ahead:
                path, value = ahead.popleft()
                self.values[path] = value
                if isinstance(value, _PLAIN) or self.paths.setdefault(id(value), path) != path:
                    continue
                ahead.extend((path + key, inside) for key, inside in _inside(value))

    def texts(self, earlier: Snapshot) -> dict[str, str]:
        """Every attribute as text, by path; objects that were not there at the time of `earlier` are `new`."""
        return {path: _text(value, earlier.paths) for path, value in self.values.items()}


def process_state() -> dict[str, Any]:
    """What a run could change of the whole process."""
    hooks = [name for name in vars(module_hooks) if name.startswith("_global_") and name.endswith("hooks")]
    return {
        "warnings.filters": [str(f) for f in warnings.filters],
        "sys.excepthook": sys.excepthook,
        "threading.excepthook": threading.excepthook,
        "atexit": atexit._ncallbacks(),
        "signals": {s.name: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)},
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "environment": sorted(os.environ.keys() - {"WORLD_SIZE"}),  # Lightning's own environment takes it away
        "gc": (gc.isenabled(), gc.get_freeze_count() > 0),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "anomaly": torch.is_anomaly_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "module hooks": {name: len(getattr(module_hooks, name)) for name in hooks},
        "rank": rank_zero_only.rank,
        "Metric": dict(vars(torchmetrics.Metric)),
        "BaseFinetuning": dict(vars(BaseFinetuning)),
        "LightningModule": dict(vars(LightningModule)),
        "checkpoint": dict(vars(torch.utils.checkpoint)),
        "autograd": dict(vars(torch.autograd)),
        "c10d": torch.distributed.distributed_c10d._coalescing_manager,
        "storage": dict(vars(torch.UntypedStorage)),
    }


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value consists of, with what is to be put behind its path."""
    if type(value) in weakref.ProxyTypes or type(value).__module__.startswith("lightning_hybrid."):
        return
    if isinstance(value, Optimizer):
        yield from _inside_optimizer(value)
    elif isinstance(value, Tensor):
        yield from ((f".{key}", len(getattr(value, key, None) or ())) for key in _TABLES)
    else:
        yield from _items(value)
        if _is_opened(value):
            yield from ((f".{key}", inside) for key, inside in list(vars(value).items()))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for number, (key, inside) in enumerate(value.items()):  # tables of hooks have running numbers as keys
            yield f"[{key!r}]" if isinstance(key, str) else f"[{number}]", inside
    elif isinstance(value, list | tuple | deque):
        yield ".length", len(value)
        yield from ((f"[{number}]", inside) for number, inside in enumerate(value))


def _inside_optimizer(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """All but the parameters and their states, of which a rank has its own."""
    for key, inside in vars(optimizer).items():
        if key not in ("param_groups", "state"):
            yield f".{key}", inside
    for number, group in enumerate(optimizer.param_groups):
        for key, inside in group.items():
            if key != "params":
                yield f".param_groups[{number}][{key!r}]", inside


def _is_opened(value: Any) -> bool:
    if isinstance(value, type | Strategy | _WrappedHook | FunctionType | MethodType | BuiltinFunctionType | partial):
        return False
    if isinstance(value, nn.Module):
        return True
    kind = f"{type(value).__module__}."
    return hasattr(value, "__dict__") and any(kind.startswith(f"{package}.") for package in _OPENED)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _text(value: Any, known: Mapping[int, str]) -> str:
    """A value as text: plain ones as they are, others by class, and by where they were found first."""
    if type(value) in weakref.ProxyTypes:
        return "proxy"
    if isinstance(value, _PLAIN):
        return re.sub(r"0x[0-9a-f]+", "0x", repr(value))
    if isinstance(value, _WrappedHook):
        return _text(value.hook, known)
    if isinstance(value, partial):
        return f"partial {_text(value.func, known)}"
    if isinstance(value, MethodType) and isinstance(value.__self__, Strategy):
        return f"method of the strategy: {value.__func__.__name__}"
    if isinstance(value, MethodType):
        return f"method {value.__func__.__module__}.{value.__func__.__qualname__}"
    if isinstance(value, FunctionType | BuiltinFunctionType):
        text = f"function {value.__module__}.{value.__qualname__}"
    elif isinstance(value, Tensor):
        text = f"{type(value).__qualname__}{tuple(value.shape)} {value.dtype} {value.requires_grad}"
    elif isinstance(value, set | frozenset):
        return f"set {sorted(map(str, value))}"
    else:
        text = _kind(value)
    return f"{text} @ {known.get(id(value), 'new')}"
