"""Notes kinds of values of batches on which a loss may depend in another way than on the first batch, and new hooks.

Ignored labels, padding and missing values make a mean over tokens another one than the mean over samples. A first batch
without them does not show it. Which of them a batch has is found on its device, and shared by the all-reduce of the
step, without another read. So are hooks of the user on gradients, and the operations that lead to the loss, which a
branch by the epoch changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid._torch_private import is_plain
from lightning_hybrid.batches import leaves_of

_SLOTS = 8
"""Groups of tensors of a batch, by the hash of their places; a fixed number, since structures of batches may differ."""
_KINDS = 4
"""Kinds of values of a tensor."""
_LINES = 32
"""Groups of lines of the user's code that define hooks, by their hash."""
_NAMES = 1024
"""Groups of pairs of operations, by two hashes each: with 60 known pairs, 1 % of new ones are taken for known."""
_OPERATIONS = 500
"""Operations that are looked at, from the loss on; the code of a loss comes last. They take less than a millisecond."""
_ALL_UNTIL, _EVERY = 16, 4
"""After the first 16 batches, every fourth one is looked at, which costs some microseconds for each of its tensors."""
_LARGEST = 2**18
"""Elements of a tensor of floating point numbers, above which it is taken for data without masks. Empirical."""


class BatchKinds:
    """Tells when a batch has kinds of values that no verified batch had, or a step has hooks that none had.

    Args:
        device: This rank's device.
        hooks: Returns the lines that define the user's hooks on gradients.
    """

    def __init__(self, device: torch.device, hooks: Callable[[], Iterable[str]]) -> None:
        self._device, self._hooks, self._batches = device, hooks, 0
        self._operations: set[str] = set()
        """Pairs of operations, one on the result of the other, that lead to the losses of the noted step."""
        self._noted: tuple[tuple, dict[str, Any]] | None = None
        self.known: list[int] | None = None
        """The kinds of all verified batches, and of hooks; None before the first one."""
        self.due: tuple[tuple, dict[str, Any]] | None = None
        """Arguments of a training step, the same on all ranks, whose batch had new kinds on some of them."""

    def note(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes the arguments of the training step that is about to run, the batch first."""
        if self._batches < _ALL_UNTIL or self._batches % _EVERY == 0:
            self._noted = (args, kwargs)
        self._batches += 1

    def saw_loss(self, loss: Tensor) -> None:
        """Notes the operations that lead to the loss of the running step."""
        if self._noted is None or loss.grad_fn is None:
            return
        seen, found = {loss.grad_fn}, [loss.grad_fn]
        for node in found:  # grows
            for before in (n for n, _ in node.next_functions if n is not None):
                self._operations.add(f"{type(node).__name__} {type(before).__name__}")
                if before not in seen and len(found) < _OPERATIONS:
                    seen.add(before)
                    found.append(before)

    def numbers(self) -> Tensor:
        """Returns a positive number for each kind that the noted step has, of shape (1088,), float64, on the device."""
        found = torch.zeros(_SLOTS, _KINDS, dtype=torch.float64, device=self._device)
        for path, value in leaves_of(self._noted[0][0]) if self._noted is not None else ():
            if isinstance(value, Tensor) and _may_mask(value):
                found[zlib.crc32(path.encode()) % _SLOTS] += _kinds_of(value)
        lines = torch.zeros(_LINES, dtype=torch.float64)
        for line in self._hooks() if self._noted is not None else ():
            lines[zlib.crc32(line.encode()) % _LINES] = 1.0
        names = torch.zeros(_NAMES, dtype=torch.float64)
        for name in self._operations:
            names[zlib.crc32(name.encode()) % _NAMES] = names[zlib.adler32(name.encode()) % _NAMES] = 1.0
        return torch.cat([found.flatten(), torch.cat([lines, names]).to(self._device)])

    def hear(self, sums: list[float]) -> None:
        """Takes the sums of `numbers` over all ranks."""
        noted, self._noted = self._noted, None
        self._operations.clear()
        if noted is None:
            return
        present = {kind for kind, number in enumerate(sums) if number > 0}
        if self.known is not None and not present.issubset(self.known):
            self.due = self.due or noted
        self.known = sorted({*(self.known or ()), *present})


def _may_mask(tensor: Tensor) -> bool:
    if not is_plain(tensor) or not tensor.numel() or tensor.is_complex():
        return False
    return not tensor.is_floating_point() or tensor.numel() <= _LARGEST


def _kinds_of(tensor: Tensor) -> Tensor:
    """Returns 4 flags: special values (negative integers, NaN, False), zeros, and rows that differ in either number."""
    if tensor.dtype == torch.bool:
        special, zeros = ~tensor, tensor
    else:
        special, zeros = tensor.isnan() if tensor.is_floating_point() else tensor < 0, tensor == 0
    masks = torch.stack([special, zeros])
    counts = masks.flatten(2).sum(-1) if masks.ndim > 2 else masks.view(2, -1).long()
    low, high = counts.aminmax(dim=1)
    return torch.cat([high > 0, high != low])
