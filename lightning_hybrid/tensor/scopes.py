"""Where parameters are local: while a unit, a step or a single module runs, its modules compute with plain tensors.

Each parameter is shadowed in its module's `__dict__`, where attribute lookup goes first, by its local part. Parameters
are looked up at each entry, since `fully_shard` exchanges them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_hybrid.ghosts.trees import map_tensors
from lightning_hybrid.spec.tensor_plan import ShardedParameter, UnitPlan
from lightning_hybrid.tensor.collectives import copy_to_ranks, select_on_rank
from lightning_hybrid.tensor.width import NarrowTensor


class Slot(NamedTuple):
    """A parameter of a module and what is done to its local part."""

    module: nn.Module
    key: str
    then: Callable[[torch.Tensor], torch.Tensor] | None


class RegionRNG(Protocol):
    """What gives the ranks random numbers of their own where each works on its own part."""

    def enter_region(self, name: str) -> None:
        """From here on this rank works on its own part; the region begins with the module `name`."""
        ...

    def leave_region(self) -> None:
        """From here on all ranks have the same values."""
        ...


def part_of(full: torch.Tensor, sharded: ShardedParameter, rank: int, ranks: int) -> torch.Tensor:
    """The part of a full weight that `rank` of `ranks` holds, as a copy."""
    if sharded.order is None:
        length = sharded.size // ranks
        return full.narrow(sharded.dim, rank * length, length).clone(memory_format=torch.contiguous_format)
    return full.index_select(sharded.dim, torch.tensor(sharded.part(rank, ranks), device=full.device))


class Scopes:
    """What is local at present, and the hooks that begin and end it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.inert = False
        self.streams: RegionRNG | None = None
        self.root: list[Slot] = []
        """Parameters outside the units."""
        self.units: dict[str, list[Slot]] = {}
        self._shadowed: dict[tuple[nn.Module, str], list[Any]] = {}
        """For each parameter that is local: what stood in its place, outermost scope first (`...` for nothing)."""
        self._calls: list[_UnitCall] = []

    def active(self) -> bool:
        """Whether hooks do anything."""
        return not self.inert

    def enter_root(self) -> None:
        """A step begins."""
        if not self.inert:
            self._shadow(self.root)

    def exit_root(self) -> None:
        """A step has ended, perhaps by an exception: nothing is local any more."""
        for module, key in self._shadowed:
            module.__dict__.pop(key, None)
        self._shadowed.clear()
        self._calls.clear()
        for slots in (self.root, *self.units.values()):
            _refresh_flat_weights(slots)

    def colwise_input(self, linear: str, tensor: torch.Tensor) -> torch.Tensor:
        """The input of a column, copied to the ranks once in a unit call however many columns use it."""
        self.ran(linear)
        self.enter_region(linear)
        if isinstance(tensor, NarrowTensor):
            tensor = tensor.whole
        if not self._calls or not (torch.is_grad_enabled() and tensor.requires_grad):
            return copy_to_ranks(tensor, self.group)
        copies = self._calls[-1].copies
        known = copies.get(id(tensor))
        if known is None or known[0] is not tensor:
            known = copies[id(tensor)] = tensor, copy_to_ranks(tensor, self.group)
        return known[1]

    def ran(self, linear: str) -> None:
        """A linear of the unit that runs at present has been called."""
        if self._calls:
            self._calls[-1].ran.add(linear)

    def enter_region(self, name: str) -> None:
        """A column is called: random numbers are this rank's own until the next row has returned.

        Not in compiled blocks, whose graphs cannot exchange the generator's state.
        """
        if self.streams is not None and not torch.compiler.is_compiling():
            self.streams.enter_region(name)

    def leave_region(self) -> None:
        """A row has returned."""
        if self.streams is not None and not torch.compiler.is_compiling():
            self.streams.leave_region()

    # ---- hooks

    def add_module(self, module: nn.Module, slots: list[Slot]) -> list[RemovableHandle]:
        """A module that is called outside its unit (a part that is recomputed) makes its own parameters local."""
        made: list[Slot] = []

        def before(_: nn.Module, args: tuple) -> None:
            if not self.inert:
                missing = [slot for slot in slots if slot.key not in module.__dict__]
                if missing:
                    made.extend(missing)
                    self._shadow(missing)

        def after(_: nn.Module, args: tuple, output: Any) -> None:
            if made:
                self._unshadow(made)
                made.clear()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def add_unit(self, name: str, module: nn.Module, plan: UnitPlan) -> list[RemovableHandle]:
        """While the unit runs, everything in it is local."""
        slots = self.units[name]

        def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
            if self.inert:
                return None
            self._shadow(slots)
            self._shadow_buffers(module, plan)
            self._calls.append(_UnitCall())
            return self._local_arguments(plan, args, kwargs) if plan.slices or plan.shared_arguments else None

        def check(_: nn.Module, args: tuple, output: Any) -> None:
            if not self.inert and self._calls:
                _check_regions(name, plan, self._calls[-1].ran)

        def after(_: nn.Module, args: tuple, output: Any) -> None:
            if self.inert:
                return
            self._unshadow(slots)
            for buffer in plan.buffers:
                owner, key = buffer.rpartition(".")[::2]
                module.get_submodule(owner).__dict__.pop(key, None)
            if self._calls:
                self._calls.pop()

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(check),
            module.register_forward_hook(after, always_call=True),
        ]

    # ---- local parts

    def _shadow(self, slots: list[Slot]) -> None:
        for slot in slots:
            parameter = slot.module._parameters.get(slot.key)
            if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
                continue  # not owned, or still sharded by `fully_shard`
            to_local = parameter.to_local()
            self._shadowed.setdefault((slot.module, slot.key), []).append(slot.module.__dict__.get(slot.key, ...))
            slot.module.__dict__[slot.key] = to_local if slot.then is None else slot.then(to_local)
        _refresh_flat_weights(slots)

    def _unshadow(self, slots: list[Slot]) -> None:
        for slot in slots:
            before = self._shadowed.get((slot.module, slot.key))
            if not before:
                continue
            value = before.pop()
            if value is ...:
                slot.module.__dict__.pop(slot.key, None)
            else:
                slot.module.__dict__[slot.key] = value
        _refresh_flat_weights(slots)

    def _shadow_buffers(self, unit: nn.Module, plan: UnitPlan) -> None:
        for name, sharded in plan.buffers.items():
            owner, _, key = name.rpartition(".")
            module = unit.get_submodule(owner)
            buffer = module._buffers.get(key)
            if buffer is not None:
                module.__dict__[key] = part_of(buffer, sharded, self.group.rank(), self.group.size())

    def _local_arguments(self, plan: UnitPlan, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        slices = {cut.path: cut for cut in plan.slices}

        def to_local(path: Any, tensor: torch.Tensor) -> torch.Tensor:
            if path not in slices:
                return copy_to_ranks(tensor, self.group) if path in plan.shared_arguments else tensor
            dim, owners = slices[path].dim, slices[path].owners
            size = tensor.shape[dim]
            if size % len(owners):
                raise ValueError(
                    f"`{path[-1]}` has {size} entries along dim {dim}; this block is divided over ranks in a way "
                    f"that needs a multiple of {len(owners)}. Keep the shape of the first batch, or keep the block "
                    "whole with `tensor_plan`."
                )
            index = [i for i in range(size) if owners[i % len(owners)] == self.group.rank()]
            return select_on_rank(tensor, dim, torch.tensor(index, device=tensor.device), self.group)

        return map_tensors(to_local, args, ("args",)), map_tensors(to_local, kwargs, ("kwargs",))


class _UnitCall:
    """One running call of a unit."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ran: set[str] = set()


def _check_regions(unit: str, plan: UnitPlan, ran: set[str]) -> None:
    """A region of which only some linears were called has not been summed over the ranks."""
    for region in plan.regions:
        missing = [name for name in region if name not in ran]
        if missing and len(missing) < len(region):
            raise RuntimeError(
                f"`{unit}` was divided over the `tp` axis with `{missing[0]}`, which its forward has not called this "
                f"time though it called `{next(n for n in region if n in ran)}`. It takes another path than in the dry "
                f"run; keep it whole with `tensor_plan={{'{unit}.*': 'replicate'}}`."
            )


def _refresh_flat_weights(slots: list[Slot]) -> None:
    """Recurrent modules keep a second list of their weights."""
    for module in {slot.module: None for slot in slots if isinstance(slot.module, nn.RNNBase)}:
        module.__dict__["_flat_weights"] = [getattr(module, key) for key in module._flat_weights_names]
