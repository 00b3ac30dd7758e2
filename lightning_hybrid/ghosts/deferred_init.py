"""Deferred initialization of a model that no process could hold: first on ghosts, then each rank's part is made real.

While `configure_model` runs, `torch.empty` returns ghosts, and operations on ghosts (initialization in place, views,
copies) are recorded. Random operations also run on a scratch tensor, so that the generator advances as in a single
process; the generator's state before each is recorded. To make a parameter real, the operations that lead to the
parameter are replayed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_hybrid._torch_private import disable_torch_function, own_buffers, tree_leaves, tree_map
from lightning_hybrid.ghosts.ghost import Ghost, GhostObserver


@dataclass
class _Entry:
    func: Any
    args: tuple
    kwargs: dict
    results: list[int]
    """Ids of the returned ghosts, in the order of the leaves."""
    state: torch.Tensor | None
    """State of the generator before a random operation; None for other operations."""


class DeferredInit(Protocol):
    """Makes the ghosts of a module real whose weights do not exist yet."""

    def make_real(self, ghost: Ghost) -> torch.Tensor:
        """Returns the whole tensor that `ghost` represents."""
        ...

    def make_buffers_real(self, root: nn.Module) -> None:
        """Makes every buffer of `root` real."""
        ...


class EmptyInit:
    """Allocates tensors without values; each rank writes the values of its part after the module is partitioned.

    Args:
        device: This rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make_real(self, ghost: Ghost) -> torch.Tensor:
        """Returns an uninitialized tensor of the ghost's shape."""
        return torch.empty(ghost.shape, dtype=ghost.dtype, device=self._device)

    def make_buffers_real(self, root: nn.Module) -> None:
        """Does nothing, since buffers are real."""


class RecordedInit(GhostObserver):
    """The recorded operations on the ghosts of one `configure_model`."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._group: list[int] = []
        self._ghosts = 0
        self._by_group: dict[int, list[_Entry]] = defaultdict(list)
        self._grouped = 0

    @property
    def is_empty(self) -> bool:
        """True if no tensor was made."""
        return self._ghosts == 0

    # ---- recording

    def empty(self, *args: Any, **kwargs: Any) -> Ghost:
        """Returns a ghost instead of `torch.empty(*args, **kwargs)`."""
        device = torch.device(kwargs.pop("device", None) or torch.get_default_device())
        requires_grad = kwargs.pop("requires_grad", False)
        kwargs.pop("pin_memory", None)
        with disable_torch_function():
            ghost = Ghost(torch.empty(*args, **kwargs, device="meta"), device, self)
        self._note(torch.empty, (tuple(ghost.shape),), {"dtype": ghost.dtype, "device": device}, [ghost], None)
        ghost.requires_grad_(requires_grad)
        return ghost

    def ran(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:  # noqa: D102
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = kwargs.get("generator") or torch.default_generator
            state = generator.get_state()
            real = tree_map(_scratch, (args, kwargs))
            func(*real[0], **real[1])  # only to advance the generator
        self._note(func, args, kwargs, [x for x in tree_leaves(result) if isinstance(x, Ghost)], state)

    def read(self, ghost: Ghost) -> Any:
        """Returns the value that an initialization reads (as rejection sampling does), by a replay."""
        return self.make_real(ghost).item()

    def _note(self, func: Any, args: tuple, kwargs: dict, ghosts: list[Ghost], state: torch.Tensor | None) -> None:
        touched = [x.uid for x in tree_leaves((args, kwargs)) if isinstance(x, Ghost)]
        for ghost in ghosts:
            if ghost.uid < 0:
                ghost.uid = self._ghosts
                self._ghosts += 1
                self._group.append(ghost.uid)
            touched.append(ghost.uid)
        for uid in touched[1:]:
            self._group[self._root(uid)] = self._root(touched[0])
        plain = tree_map(lambda x: _Ref(x.uid) if isinstance(x, Ghost) else x, (args, kwargs))
        self._entries.append(_Entry(func, plain[0], plain[1], [g.uid for g in ghosts], state))

    def _root(self, uid: int) -> int:
        while self._group[uid] != uid:
            self._group[uid] = self._group[self._group[uid]]
            uid = self._group[uid]
        return uid

    # ---- replay

    def make_real(self, ghost: Ghost) -> torch.Tensor:
        """Replays the initialization of `ghost`; returns the tensor that a module built without ghosts would have."""
        if self._grouped < len(self._entries):
            self._grouped = len(self._entries)
            self._by_group.clear()
            for entry in self._entries:
                self._by_group[self._root(entry.results[0] if entry.results else _first_ref(entry))].append(entry)
        tensors_by_uid: dict[int, torch.Tensor] = {}
        present_state = torch.get_rng_state()
        for entry in self._by_group[self._root(ghost.uid)]:
            args, kwargs = tree_map(
                lambda x: tensors_by_uid[x.uid] if isinstance(x, _Ref) else x, (entry.args, entry.kwargs)
            )
            if entry.state is not None:
                torch.set_rng_state(entry.state)
                kwargs = {**kwargs, "generator": None} if "generator" in kwargs else kwargs
            with torch.no_grad():
                out = entry.func(*args, **kwargs)
            tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            tensors_by_uid.update(zip(entry.results, tensors, strict=True))
        torch.set_rng_state(present_state)
        return tensors_by_uid[ghost.uid].detach()

    def make_buffers_real(self, root: nn.Module) -> None:
        """Makes every buffer of `root` real."""
        for module in root.modules():
            for key, buffer in own_buffers(module).items():
                if isinstance(buffer, Ghost):
                    own_buffers(module)[key] = self.make_real(buffer)


@dataclass(frozen=True)
class _Ref:
    uid: int


def _first_ref(entry: _Entry) -> int:
    return next(x.uid for x in tree_leaves((entry.args, entry.kwargs)) if isinstance(x, _Ref))


def _scratch(x: Any) -> Any:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Ghost) else x


class _EmptyIsGhost(TorchFunctionMode):
    def __init__(self, deferred_init: RecordedInit) -> None:
        super().__init__()
        self._deferred_init = deferred_init

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.empty and (kwargs or {}).get("out") is None:
            return self._deferred_init.empty(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_init() -> Iterator[RecordedInit]:
    """Makes `torch.empty` (hence the weights of torch's modules) return ghosts, recorded by the yielded object."""
    deferred_init = RecordedInit()
    with _EmptyIsGhost(deferred_init):
        yield deferred_init
