"""Lets hooks of the user read and change divided weights as on one process.

torch fills a DTensor with numbers that each rank draws for its part alone, so parts of a weight would be alike. It sets
`.data` of a DTensor without effect. Here every rank draws the numbers of the whole weight and takes its part, since the
generators of ranks are equal between steps. For weights of other pipeline stages, it draws the numbers and drops them.

A DTensor has its parts in the order of the ranks. Where the user's order is another one (queries, keys and values in
one weight; experts that were moved), sums and operators on each element are those of one process, `full_tensor()`
returns the user's order, and what depends on the position of an element is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from lightning_hybrid._torch_private import (
    READ_SCALAR,
    DispatchMode,
    local_part,
    running_mode,
    storage_key,
    tree_leaves,
    tree_map_only,
    user_location,
    written_arguments,
)
from lightning_hybrid.collectives import to_full
from lightning_hybrid.compat.expert_weights import ExpertWeights
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.placement import index_of, selected
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.tensor_index import Index, whole_index

_aten = torch.ops.aten
_VALUES_USED = {_aten.bernoulli, _aten.native_dropout, _aten.multinomial}
"""Random operators whose results depend on the values of their first argument."""
_BY_ELEMENT = {
    *("detach", "alias", "clone", "_to_copy", "copy_", "fill_", "zero_", "lift_fresh", "zeros_like", "ones_like"),
    *("full_like", "empty_like", "rand_like", "randn_like", "normal_", "uniform_", "bernoulli_"),
}
"""Operators on each element that torch does not tag as such."""
_REDUCTIONS = {
    *("sum", "mean", "prod", "norm", "linalg_vector_norm", "_foreach_norm", "max", "min", "amax", "amin", "std", "var"),
    *("any", "all", "count_nonzero", "equal", "_local_scalar_dense"),
}
"""Operators whose results do not depend on the order of the elements that they combine."""
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class _Moved(NamedTuple):
    """What is laid out like a weight whose elements are in another order than the user's."""

    storage: StorageWeakRef
    name: str
    """Of the weight."""


class DividedWeights:
    """The weights of this rank of which other ranks have parts.

    Args:
        partition: The applied partition.
    """

    def __init__(self, partition: Partition) -> None:
        self.partition, self.layout = partition, partition.plan.layout
        self.experts = ExpertWeights(partition)
        self.shapes: dict[str, torch.Size] = {}
        """Shapes of the whole weights."""
        self.indices: dict[str, Index] = {}
        self.moved: dict[str, int] = {}
        """Weights whose elements are in another order than the user's: the dim of the order, counted from the last."""
        self._laid_out: dict[tuple[int, int], _Moved] = {}
        self.copies: dict[int, StorageWeakRef] = {}
        """Memory of views of DTensors for which torch has gathered values, so that writing into them is lost."""
        self.drawn_for_others = False
        """True if random numbers have been drawn for weights of other pipeline stages."""
        self.share: Callable[[Any], None] | None = None
        """Sends a value that is read to the other pipeline stages, where all run the same code."""
        for name in partition.parameters.local() if self.layout.devices > self.layout.dp else ():
            shape, index = partition.shape_of(name), index_of(partition, name)
            if index != whole_index(shape):
                self.shapes[name], self.indices[name] = shape, index
                tensor, experts = partition.plan.sharded_over_tp(name), partition.expert_plan_of(name)
                in_order = (tensor is None or tensor.order is None) and (
                    experts is None or (experts.order is None and self.layout.fsdp == 1)
                )
                if not in_order:
                    self.moved[name] = (0 if tensor is None else tensor.dim) - len(shape)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Runs code of the user that may compute with divided weights and gradients, or set their data."""
        if self.layout.devices == self.layout.dp:
            yield
            return
        for name in self.moved:
            parameter = self.partition.parameters[name]
            for tensor in (parameter, parameter.grad):
                if tensor is not None:
                    self.mark(tensor, name)
        with ExitStack() as stack:
            stack.enter_context(self._full_tensors())
            stack.enter_context(running_mode(_SetData()))
            stack.enter_context(running_mode(_OfWholeWeights(self)))
            stack.callback(self._forget_freed)
            yield

    def _forget_freed(self) -> None:
        """Drops notes of memory that was freed; they would add up over the steps, and keep its address in use."""
        self._laid_out = {k: moved for k, moved in self._laid_out.items() if not moved.storage.expired()}
        self.copies = {k: storage for k, storage in self.copies.items() if not storage.expired()}

    def mark(self, tensor: Tensor, name: str) -> None:
        """Notes that `tensor` is laid out like the weight `name`, as long as its memory exists."""
        if name in self.moved:
            local = local_part(tensor.detach())
            self._laid_out[_memory(local)] = _Moved(StorageWeakRef(local.untyped_storage()), name)

    def moved_as(self, tensor: Tensor) -> str | None:
        """Returns the weight that `tensor` is laid out like, if its elements are in another order than the user's."""
        known = self._laid_out.get(_memory(local_part(tensor)))
        return None if known is None or known.storage.expired() else known.name

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Returns the whole of a DTensor in the order of the model. Collective over the ranks that have parts."""
        name = self.moved_as(tensor)
        return to_full(tensor) if name is None else self._in_order(tensor, name)

    def _in_order(self, tensor: Tensor, name: str) -> Tensor:
        experts = self.partition.experts
        if experts is not None and name in self.experts.shapes:
            return experts.gathered(name, to_full(self.experts.like_part(name, tensor)))
        return self.partition.gathered(name, tensor)

    def _full_tensors(self) -> AbstractContextManager:
        """Makes `DTensor.full_tensor` return the user's order."""
        original = DTensor.full_tensor

        def full_tensor(tensor: DTensor, **options: Any) -> Tensor:
            name = self.moved_as(tensor.detach())
            with _full_tensor_is(original):
                return original(tensor, **options) if name is None else self._in_order(tensor.detach(), name)

        return _full_tensor_is(full_tensor)


@contextmanager
def _full_tensor_is(method: Callable[..., Tensor]) -> Iterator[None]:
    present, DTensor.full_tensor = DTensor.full_tensor, method  # type: ignore[method-assign]
    try:
        yield
    finally:
        DTensor.full_tensor = present  # type: ignore[method-assign]


class _SetData(TorchFunctionMode):
    """Copies what is assigned to `.data` of a DTensor, which torch would ignore."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == _SET_DATA and isinstance(args[0], DTensor):
            with torch.no_grad():
                return args[0].copy_(args[1])
        return func(*args, **(kwargs or {}))


class _OfWholeWeights(DispatchMode):
    """Draws random numbers for whole weights, and refuses what depends on an order that is not the user's.

    Args:
        weights: The divided weights.
    """

    def __init__(self, weights: DividedWeights) -> None:
        super().__init__()
        self._weights = weights
        self._names: dict[tuple, str] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        groups = self._groups(args) if func.overloadpacket.__name__.startswith("_foreach_") else []
        if len(groups) > 1:
            return self._in_groups(func, groups, args, kwargs)
        if any(isinstance(t, Ghost) for t in tree_leaves((args, kwargs))):  # the result is a ghost, or an error
            args = tree_map_only(DTensor, _of_any_values, args)
            kwargs = dict(tree_map_only(DTensor, _of_any_values, kwargs))
        order = self._order(func, args, kwargs) if self._weights.moved else None
        self._check_written(func, args)
        if torch.Tag.nondeterministic_seeded in func.tags and args and isinstance(args[0], Tensor):
            out = self._drawn(func, args[0], args, kwargs)
        else:
            out = func(*args, **kwargs)
        if func.is_view and isinstance(args[0], DTensor):
            self._note_copies(storage_key(local_part(args[0])), out)
        if order is not None:
            self._mark_results(func, args[0], out, order)
        if self._weights.share is not None and func.overloadpacket is READ_SCALAR and not isinstance(args[0], Ghost):
            self._weights.share(out)
        return out

    def _groups(self, args: tuple) -> list[list[int]]:
        """Returns the positions in lists of tensors, by the class, mesh and order of the tensors."""
        groups: dict[Any, list[int]] = {}
        for i in range(len(args[0])):
            found = [a[i] for a in args if _is_list_of(a, len(args[0])) and isinstance(a[i], Tensor)]
            kinds = [(str(t.device_mesh), self._weights.moved_as(t)) for t in found if isinstance(t, DTensor)]
            others = [type(t).__name__ for t in found if not isinstance(t, DTensor)]
            groups.setdefault((*kinds, *others), []).append(i)
        return list(groups.values())

    def _in_groups(self, func: Any, groups: list[list[int]], args: tuple, kwargs: dict) -> Any:
        """Runs an operator on lists of tensors, which torch runs on tensors of one class and mesh only."""
        count = sum(map(len, groups))
        results: dict[int, Any] = {}
        for group in groups:
            part = tuple([a[i] for i in group] if _is_list_of(a, count) else a for a in args)
            out = self.__torch_dispatch__(func, (), part, kwargs)
            results |= {} if out is None else dict(zip(group, out, strict=True))
        return [results[i] for i in range(count)] if results else None

    def _mark_results(self, func: Any, given: Any, out: Any, order: str) -> None:
        for tensor in (t for t in tree_leaves(out) if isinstance(t, DTensor) and t.numel() > 1):
            # if dims are dropped, it is not known which one has the order
            if func.overloadpacket.__name__ in _REDUCTIONS and tensor.ndim != given.ndim:
                raise self._refused(func, order)
            if tensor.shape[self._weights.moved[order]] > 1:
                self._weights.mark(tensor, order)

    def _order(self, func: Any, args: tuple, kwargs: dict) -> str | None:
        """Returns the weight whose order the arguments have, if it is not the user's.

        Raises:
            PartitionError: If the operator depends on positions, or has arguments of several orders.
        """
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, Ghost)]
        found = [self._weights.moved_as(t) if isinstance(t, DTensor) else None for t in tensors]
        order = next((name for name in found if name is not None), None)
        if order is None:
            return None
        by_element = (
            torch.Tag.pointwise in func.tags
            or func.overloadpacket.__name__ in _BY_ELEMENT
            or func.overloadpacket.__name__.startswith("_foreach_")
        )
        dim = self._weights.moved[order]
        mixed = any(
            name is None and t.ndim >= -dim and t.shape[dim] > 1 for name, t in zip(found, tensors, strict=True)
        )
        if mixed or not (by_element or func.overloadpacket.__name__ in _REDUCTIONS):
            raise self._refused(func, order)
        return order

    def _note_copies(self, viewed: int, views: Any) -> None:
        for view in (v for v in tree_leaves(views) if isinstance(v, DTensor)):
            storage = storage_key(local_part(view))
            if storage != viewed or viewed in self._weights.copies:
                self._weights.copies[storage] = StorageWeakRef(local_part(view).untyped_storage())

    def _check_written(self, func: Any, args: tuple) -> None:
        """Refuses to write into values that torch has gathered from several ranks: the weight would not change."""
        for tensor, written in zip(args, written_arguments(func), strict=False) if self._weights.copies else ():
            if written and isinstance(tensor, DTensor):
                known = self._weights.copies.get(storage_key(local_part(tensor)))
                if known is not None and not known.expired():
                    raise PartitionError(
                        f"`layout='{self._weights.layout}'`: {user_location()} writes into a part of a weight or "
                        f"gradient (`{func}`) that several ranks have, which torch does not do. Change a whole weight, "
                        "as by `weight.mul_(mask)` with a mask made of it, or write in `with "
                        "self.trainer.strategy.whole(self):`, where every rank has the weights whole."
                    )

    def _refused(self, func: Any, name: str) -> PartitionError:
        return PartitionError(
            f"`layout='{self._weights.layout}'`: {user_location()} computes with elements of `{name}` by their "
            f"position (`{func}`), and ranks have its elements in another order. Use `parameter.full_tensor()`, which "
            "returns the whole in the order of the model on every rank, or change weights in `with "
            "self.trainer.strategy.whole(self):`."
        )

    def _drawn(self, func: Any, given: Tensor, args: tuple, kwargs: dict) -> Any:
        if isinstance(given, Ghost):
            self._weights.drawn_for_others = True
            func(torch.empty(given.shape, dtype=given.dtype, device=given.device), *args[1:], **kwargs)
            return func(*args, **kwargs)
        name = self._divided().get(_place_of(given))
        if name is None and not isinstance(given, DTensor):
            return func(*args, **kwargs)
        if name is None and all(p.is_replicate() for p in given.placements):  # type: ignore[attr-defined]
            drawn = func(local_part(given), *args[1:], **kwargs)
            return given if _writes(func) else _replicated(drawn, given)
        if name is None or func.overloadpacket in _VALUES_USED:
            raise PartitionError(
                f"`layout='{self._weights.layout}'`: {user_location()} draws random numbers (`{func}`) for a "
                f"tensor of shape {tuple(given.shape)} of which each rank has a part. Draw them for a weight or its "
                "gradient itself, such as `torch.randn_like(weight)`, or change the weights in "
                "`with self.trainer.strategy.whole(self):`, where every rank has them whole."
            )
        drawn = func(
            torch.empty(tuple(self._weights.shapes[name]), dtype=given.dtype, device=given.device), *args[1:], **kwargs
        )
        target = given if _writes(func) else torch.empty_like(given, dtype=drawn.dtype)
        local_part(target).copy_(selected(drawn, self._weights.indices[name]))
        return target

    def _divided(self) -> dict[tuple, str]:
        """Returns the names of divided weights by the memory of this rank's part, and of its gradient."""
        if self._names is None:
            self._names = {}
            parameters = self._weights.partition.parameters
            for name in self._weights.shapes:
                for tensor in (parameters.visible(name), parameters.visible(name).grad):
                    if tensor is not None:
                        self._names[_place_of(tensor.detach())] = name
        return self._names


def _replicated(tensor: Tensor, like: Any) -> DTensor:
    return DTensor.from_local(tensor, like.device_mesh, like.placements, run_check=False)


def _of_any_values(tensor: DTensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _is_list_of(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count


def _place_of(tensor: Tensor) -> tuple:
    """Returns what views of the same elements have in common; gradients of `fsdp` share their memory."""
    return *_memory(local_part(tensor)), tuple(tensor.shape)


def _memory(local: Tensor) -> tuple[int, int]:
    return storage_key(local), int(local.storage_offset())


def _writes(func: Any) -> bool:
    return func.overloadpacket.__name__.endswith("_")
