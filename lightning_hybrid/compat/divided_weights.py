"""Lets hooks of the user draw random numbers into divided weights and replace their data, as on one process.

torch fills a DTensor with numbers that each rank draws for its part alone, so parts of a weight would be alike. It sets
`.data` of a DTensor without effect. Here every rank draws the numbers of the whole weight and takes its part, since the
generators of ranks are equal between steps. For weights of other pipeline stages, it draws the numbers and drops them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from lightning_hybrid._torch_private import DispatchMode, storage_key, user_location
from lightning_hybrid.collectives import to_local
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.placement import index_of, selected
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.tensor_index import whole_index

_aten = torch.ops.aten
_VALUES_USED = {_aten.bernoulli, _aten.native_dropout, _aten.multinomial}
"""Random operators whose results depend on the values of their first argument."""


@contextmanager
def as_of_whole_weights(partition: Partition) -> Iterator[None]:
    """Runs code of the user that may draw random numbers for divided weights and gradients, or set their data."""
    layout = partition.plan.layout
    if layout.devices == layout.dp:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_SetData())
        stack.enter_context(_Draws(partition))
        yield


class _SetData(TorchFunctionMode):
    """Copies what is assigned to `.data` of a DTensor, which torch would ignore."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == _SET_DATA and isinstance(args[0], DTensor):
            with torch.no_grad():
                return args[0].copy_(args[1])
        return func(*args, **(kwargs or {}))


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class _Draws(DispatchMode):
    """Draws random numbers for whole weights.

    Args:
        partition: The applied partition.
    """

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self._partition = partition
        self._names: dict[tuple, str] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = args[0] if args else None
        if torch.Tag.nondeterministic_seeded not in func.tags or not isinstance(given, Tensor):
            return func(*args, **kwargs)
        if isinstance(given, Ghost):
            func(torch.empty(given.shape, dtype=given.dtype, device=given.device), *args[1:], **kwargs)
            return func(*args, **kwargs)
        name = self._divided().get(_place_of(given))
        if name is None and not isinstance(given, DTensor):
            return func(*args, **kwargs)
        if name is None or func.overloadpacket in _VALUES_USED:
            raise PartitionError(
                f"`layout='{self._partition.plan.layout}'`: {user_location()} draws random numbers (`{func}`) for a "
                f"tensor of shape {tuple(given.shape)} of which each rank has a part. Draw them for a weight or its "
                "gradient itself, such as `torch.randn_like(weight)`, or change the weights in "
                "`with self.trainer.strategy.whole(self):`, where every rank has them whole."
            )
        drawn = func(
            torch.empty(tuple(self._partition.shape_of(name)), dtype=given.dtype, device=given.device),
            *args[1:],
            **kwargs,
        )
        part = selected(drawn, index_of(self._partition, name))
        target = given if _writes(func) else torch.empty_like(given, dtype=drawn.dtype)
        to_local(target).copy_(part)
        return target

    def _divided(self) -> dict[tuple, str]:
        """Returns the names of divided weights by the memory of this rank's part, and of its gradient."""
        if self._names is None:
            self._names = {}
            for name, parameter in self._partition.parameters.local().items():
                if index_of(self._partition, name) != whole_index(self._partition.shape_of(name)):
                    for tensor in (parameter, parameter.grad):
                        if tensor is not None:
                            self._names[_place_of(tensor.detach())] = name
        return self._names


def _place_of(tensor: Tensor) -> tuple:
    """Returns what views of the same elements have in common; gradients of `fsdp` share their memory."""
    local = to_local(tensor)
    return storage_key(local), local.storage_offset(), tuple(tensor.shape)


def _writes(func: Any) -> bool:
    return func.overloadpacket.__name__.endswith("_")
