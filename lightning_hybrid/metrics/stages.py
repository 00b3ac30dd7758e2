"""Sends the loss of a pipeline's last stage, and the other outputs of `training_step`, to the other stages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid._torch_private import TreeSpec, tree_flatten, tree_unflatten
from lightning_hybrid.collectives import share_object
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.reduction import as_numbers

_EXACT = 2**53
"""Bound up to which float64 represents every whole number exactly."""


class _Array(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype


class _Form(NamedTuple):
    """The form of the extras: all but the values of tensors and numbers."""

    structure: TreeSpec
    leaves: list[Any]
    """For each leaf: an `_Array`; `int` or `float`; a constant; or an object that equals no other."""

    @property
    def numbers(self) -> int:
        """Number of leaves that are numbers."""
        return sum(leaf in (int, float) for leaf in self.leaves)

    @property
    def sizes(self) -> list[int]:
        """Number of bytes of each tensor."""
        return [x.shape.numel() * x.dtype.itemsize for x in self.leaves if isinstance(x, _Array)]


class StageOutputs:
    """Sends the loss and the extras to all stages, in one broadcast while the form of the extras stays the same.

    Args:
        mesh: The mesh.
        device: This rank's device.
        last: The pipeline rank of the last stage.
    """

    def __init__(self, mesh: Mesh, device: torch.device, last: int) -> None:
        self._group, self._device, self._last = mesh.log_stage_group, device, last
        self._form = _form_of({})
        self.objects_sent = 0
        """Number of times that extras were sent as an object."""

    def share(self, loss: Tensor | None, extras: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Returns the loss and the extras of the last stage on every stage. Collective over the ranks of a pipeline.

        Args:
            loss: The loss, on the rank of the last stage; None elsewhere.
            extras: The other outputs of `training_step`, on the rank of the last stage.
        """
        form, header = self._form, 8 * (2 + self._form.numbers)
        message = torch.zeros(header + sum(form.sizes), dtype=torch.uint8, device=self._device)
        new = False
        if loss is not None:
            form = _form_of(extras)
            new = form != self._form
            own = self._message(loss, {} if new else extras, new)
            message[: own.numel()] = own
        dist.broadcast(message, dist.get_global_rank(self._group, self._last), group=self._group)
        head, tensors = message[:header].clone().view(torch.float64), message[header:]
        numbers: list[float] = []
        if loss is None:
            new, _, *numbers = head.tolist()
        if new:
            self.objects_sent += 1
            extras = share_object(extras, self._last, self._group, self._device)
            self._form = _form_of(extras) if loss is None else form
        elif loss is None:
            extras = self._read(numbers, tensors)
        return head[1].float(), extras

    def _message(self, loss: Tensor, extras: dict[str, Any], new: bool) -> Tensor:
        """Returns the bytes of `new` (True if the form has changed), the loss, the numbers, and the tensors."""
        leaves = tree_flatten(extras)[0]
        tensors = [x.to(self._device).contiguous() for x in leaves if isinstance(x, Tensor)]
        numbers = as_numbers([float(new), 0.0, *(float(x) for x in leaves if type(x) in (int, float))], self._device)
        numbers[1] = loss.detach()
        return torch.cat([x.reshape(-1).view(torch.uint8) for x in (numbers, *tensors)])

    def _read(self, numbers: list[float], tensors: Tensor) -> dict[str, Any]:
        found: list[Any] = []
        numbers_left, tensors_left = iter(numbers), iter(tensors.split(self._form.sizes))
        for leaf in self._form.leaves:
            if isinstance(leaf, _Array):
                found.append(next(tensors_left).clone().view(leaf.dtype).view(leaf.shape))
            else:
                found.append(leaf(next(numbers_left)) if leaf in (int, float) else leaf)
        return tree_unflatten(found, self._form.structure)


def _form_of(extras: dict[str, Any]) -> _Form:
    leaves, structure = tree_flatten(extras)
    return _Form(structure, [_described(leaf) for leaf in leaves])


def _described(leaf: Any) -> Any:
    if type(leaf) is Tensor and leaf.layout == torch.strided:
        return _Array(leaf.shape, leaf.dtype)
    if type(leaf) is float or (type(leaf) is int and abs(leaf) <= _EXACT):
        return type(leaf)
    return leaf if isinstance(leaf, str | bytes | bool | int | None) else object()
