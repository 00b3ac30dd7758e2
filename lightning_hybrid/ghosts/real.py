"""Real tensors in a dry run: those that are written with values of ghosts, and shapes that depend on their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_hybrid._torch_private import is_plain, own_buffers, storage_key, tree_flatten, tree_unflatten
from lightning_hybrid.ghosts.ghost import Ghost

_SELECTING = {
    "nonzero",
    "argwhere",
    "where",
    "unique",
    "unique_consecutive",
    "bincount",
    "tolist",
    "numpy",
    "__array__",
}
_SELECTING |= {"__int__", "__index__"}
"""Functions whose result has a shape, or becomes a Python number, that depends on the values of the first argument."""
_SELECTING_BY = {"masked_select", "repeat_interleave", "_pack_padded_sequence"}
"""Functions whose result has a shape that depends on the values of other arguments."""


class RealTensors(TorchFunctionMode):
    """Replaces every real tensor that was written with a ghost by a ghost, wherever it is used from then on.

    Args:
        root: The LightningModule. Its buffers and other tensors are not replaced where units write them: each stage
            keeps its own.
        make_ghost: Returns a new ghost like a tensor.
        by_value: Called when a shape, a Python number or a truth value is made from the values of a real tensor; with
            True if it is a shape or a number.
    """

    def __init__(
        self, root: nn.Module, make_ghost: Callable[[torch.Tensor], Ghost], by_value: Callable[[bool], None]
    ) -> None:
        super().__init__()
        self._make_ghost, self._by_value = make_ghost, by_value
        tensors: list[Any] = [
            t for m in root.modules() for t in (*own_buffers(m).values(), *vars(m).values()) if is_plain(t)
        ]
        self._state = {storage_key(t): t for t in tensors}
        self._made: dict[int, torch.Tensor] | None = None
        """In a unit: a tensor of each storage that the unit has made, which keeps it alive."""
        self._written: dict[int, torch.Tensor] = {}
        """A tensor of each storage that was written, which keeps it alive."""
        self._ghosts: dict[int, tuple[torch.Tensor, Ghost]] = {}

    def is_state(self, tensor: torch.Tensor) -> bool:
        """Returns True if `tensor` is a buffer or attribute of a module, or a view of one."""
        return storage_key(tensor) in self._state

    def __contains__(self, tensor: Any) -> bool:
        return is_plain(tensor) and storage_key(tensor) in self._written

    def made_in_unit(self, tensor: torch.Tensor) -> bool:
        """Returns True if the running unit has made `tensor`."""
        return self._made is not None and storage_key(tensor) in self._made

    @contextmanager
    def in_unit(self) -> Iterator[None]:
        """Notes the tensors that are made in the context, in which a unit runs on ghosts."""
        self._made = {}
        try:
            yield
        finally:
            self._made = None

    def overwrite(self, tensor: torch.Tensor) -> None:
        """Makes every later use of `tensor`, and of tensors that share its memory, that of a ghost."""
        self._written[storage_key(tensor)] = tensor

    def replaced(self, tree: Any) -> Any:
        """Returns `tree` with ghosts in place of written tensors."""
        if not self._written:
            return tree
        flat, spec = tree_flatten(tree)
        present = [self._ghost(x) if is_plain(x) and storage_key(x) in self._written else x for x in flat]
        return tree if all(a is b for a, b in zip(flat, present, strict=True)) else tree_unflatten(present, spec)

    def _ghost(self, tensor: torch.Tensor) -> Ghost:
        if id(tensor) not in self._ghosts:
            self._ghosts[id(tensor)] = tensor, self._make_ghost(tensor)
        return self._ghosts[id(tensor)][1]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.untyped_storage:  # as `storage_key` calls it
            return func(*args)
        present: Any = self.replaced((args, kwargs or {}))
        name = getattr(func, "__name__", "")
        if (selects := _selects(name, present)) or (name == "__bool__" and _is_real(present[0][0])):
            self._by_value(selects)
        out = func(*present[0], **present[1])
        if self._made is not None and is_plain(out):
            self._note(self._made, present, out)
        return out

    def _note(self, made: dict[int, torch.Tensor], arguments: Any, out: torch.Tensor) -> None:
        key = storage_key(out)
        if all(storage_key(x) != key for x in tree_flatten(arguments)[0] if is_plain(x)):
            made[key] = out


def _selects(name: str, arguments: Any) -> bool:
    args, kwargs = arguments
    if name == "item":
        return _is_count(args[0])
    if name in ("__getitem__", "__setitem__"):
        return any(_is_mask(x) or _is_slice(x) for x in tree_flatten(args[1])[0])
    if name in _SELECTING:
        return _is_real(args[0]) and (name != "where" or len(args) == 1)
    return name in _SELECTING_BY and any(_is_real(x) for x in tree_flatten((args[1:], kwargs))[0])


def _is_real(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, Ghost)


def _is_count(x: Any) -> bool:
    return _is_real(x) and not x.dtype.is_floating_point and x.dtype != torch.bool


def _is_slice(x: Any) -> bool:
    return isinstance(x, slice) and any(_is_real(bound) for bound in (x.start, x.stop, x.step))


def _is_mask(x: Any) -> bool:
    return _is_real(x) and x.dtype in (torch.bool, torch.uint8)
