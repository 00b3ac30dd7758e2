"""Counts the bytes of live tensors on a device while a step runs.

torch ships `torch.distributed._tools.mem_tracker.MemTracker` for this. It keeps statistics by module, for which every
module may run only once per step (a pipeline runs modules once per microbatch), and hooks on all modules and
parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hybrid._torch_private import DispatchMode, storage_resizes_seen, tree_leaves, wrap_others


class MemoryTracker(DispatchMode):
    """Counts the storages of live tensors while it is entered, below autograd.

    A tensor that existed before counts from the start once an operator reads it; `count` adds others. Memory that an
    operator frees before it returns, and memory that an allocator rounds up or caches, is not counted.

    Args:
        device: Tensors on devices of this type are counted.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self._sizes: dict[int, int] = {}
        """Bytes of each live storage, by its id."""
        self._alive: dict[int, weakref.ref] = {}
        self._before = 0
        """Bytes of storages that existed before the step."""
        self._since = 0
        """Bytes allocated minus bytes freed by the step."""
        self._growth: list[int] = []
        """`_since` after each allocation: every possible peak."""
        self._stack = ExitStack()

    @property
    def peak_bytes(self) -> int:
        """Peak of the live bytes."""
        return self._before + max(self._growth, default=0)

    def profile(self) -> list[int]:
        """Returns the live bytes after each allocation."""
        return [self._before + growth for growth in self._growth]

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that exist before the step."""
        for tensor in tensors:
            for storage in self._storages(tensor):
                self._old(storage)

    def __enter__(self) -> Any:
        """Starts counting."""
        self._growth.append(self._since)
        self._stack.enter_context(storage_resizes_seen(self._resized))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stops counting."""
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if wrap_others(types):  # DTensors, ghosts: they come back here with the plain tensors inside
            return NotImplemented
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                for storage in self._storages(value):
                    self._old(storage)
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                for storage in self._storages(value):
                    self._new(storage)
        return out

    def _storages(self, tensor: Tensor) -> list[torch.UntypedStorage]:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if tensor.layout != torch.strided or wrap_others([type(tensor)]):
            return []
        storage = tensor.untyped_storage()
        return [storage] if storage.device.type == self._device else []

    def _old(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._sizes:
            self._watch(storage)
            self._before += storage.nbytes()

    def _new(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._sizes:
            if storage.nbytes() != self._sizes[id(storage)]:
                self._resized(storage)
            return
        self._watch(storage)
        self._add(storage.nbytes())

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._sizes:
            if storage.device.type == self._device:
                self._new(storage)
            return
        change = storage.nbytes() - self._sizes[id(storage)]
        self._sizes[id(storage)] += change
        self._add(change)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        self._sizes[key] = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._gone(key))

    def _gone(self, key: int) -> None:
        self._since -= self._sizes.pop(key)
        del self._alive[key]

    def _add(self, size: int) -> None:
        self._since += size
        if size > 0:
            self._growth.append(self._since)
