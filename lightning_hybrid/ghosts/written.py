"""Real tensors that a dry run writes, so that only some stages have their content."""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from lightning_hybrid._torch_private import is_plain, storage_key, tree_leaves, user_location
from lightning_hybrid.ghosts.use import METADATA

_FORM = {*METADATA, "__get__", "is_inference", "untyped_storage", "data_ptr"}
"""Functions that read no values; attributes that are tensors count when they are used themselves."""
_NORMALIZATIONS = {"batch_norm", "instance_norm"}


class Statistic(NamedTuple):
    """An update of running statistics, which leaves no trace on ghosts."""

    interval: int
    inside: bool
    """True if a unit has made it."""
    where: str
    tensor: torch.Tensor


class WrittenTensors(TorchFunctionMode):
    """Real tensors that were written with values of ghosts, so that only some stages have their content.

    Args:
        interval: Returns the current interval of the dry run.
        inside: Returns True while a unit runs.
    """

    def __init__(self, interval: Callable[[], int], inside: Callable[[], bool]) -> None:
        super().__init__()
        self._interval, self._inside = interval, inside
        self._written: dict[int, tuple[int, str, torch.Tensor]] = {}
        self.places: set[str] = set()
        """The lines of the user's code that write."""
        self.uses: dict[tuple[int, int], str] = {}
        """By the intervals of a write and of a later use: what happens, in words."""
        self.statistics: list[Statistic] = []

    def add(self, target: torch.Tensor) -> None:
        """Records that `target` has been written, from here on."""
        where = user_location()
        self.places.add(where)
        self._written[storage_key(target)] = self._interval(), where, target

    def __contains__(self, tensor: Any) -> bool:
        return is_plain(tensor) and storage_key(tensor) in self._written

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if self._written and name not in _FORM:  # before a write, which begins anew
            self.used((args, kwargs))
        if name in _NORMALIZATIONS:
            self._note_statistics(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _note_statistics(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Records the running statistics that a function of torch, or the one of `torch.nn.functional`, updates."""
        first = 3 if isinstance(func, BuiltinFunctionType) else 1
        named = {"running_mean": args[first : first + 1], "running_var": args[first + 1 : first + 2]}
        trains = next((kwargs[k] for k in ("training", "use_input_stats") if k in kwargs), args[5:6])
        for key, given in named.items():
            tensor = kwargs.get(key, given[0] if given else None)
            if tensor is not None and trains and trains != (False,):
                self.statistics.append(Statistic(self._interval(), self._inside(), user_location(), tensor))

    def used(self, tree: Any) -> None:
        """Records that the tensors in `tree` are used now."""
        if not self._written:
            return
        for value in tree_leaves(tree):
            if is_plain(value) and (found := self._written.get(storage_key(value))) is not None:
                begun, where, _ = found
                text = f"{user_location()} uses a tensor that {where} has written with a value of an earlier stage"
                self.uses.setdefault((begun, self._interval()), text)

    def refusal(self, cut: int) -> str | None:
        """Returns why the step cannot be cut at call `cut`; None if it can."""
        return next((text for (begun, used), text in self.uses.items() if begun < cut <= used), None)
