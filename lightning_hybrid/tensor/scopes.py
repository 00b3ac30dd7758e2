"""Replaces DTensor parameters by local tensors while a unit, a step or a single module runs.

The local tensor is set in the module's `__dict__`, which attribute lookup reads first. Parameters are looked up at each
entry, since `fully_shard` replaces them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_hybrid._torch_private import flat_weight_names, in_transform, own_buffers, own_parameters
from lightning_hybrid.ghosts.trees import map_tensors
from lightning_hybrid.spec.tensor_plan import ShardedParameter, UnitPlan
from lightning_hybrid.tensor.collectives import copy_to_ranks, select_on_rank
from lightning_hybrid.tensor.width import NarrowTensor


class Slot(NamedTuple):
    """A parameter of a module, and a function applied to its local part (None: no function)."""

    module: nn.Module
    key: str
    then: Callable[[torch.Tensor], torch.Tensor] | None


class RegionRNG(Protocol):
    """Gives each rank different random numbers inside divided regions."""

    def enter_region(self, name: str) -> None:
        """Switches to random numbers of this rank; the region begins with the module `name`."""
        ...

    def leave_region(self) -> None:
        """Switches to random numbers that are equal on all ranks."""
        ...


def part_of(full: torch.Tensor, sharded: ShardedParameter, rank: int, ranks: int) -> torch.Tensor:
    """Returns a copy of the part of a full weight that `rank` of `ranks` holds."""
    if sharded.order is None:
        length = sharded.size // ranks
        return full.narrow(sharded.dim, rank * length, length).clone(memory_format=torch.contiguous_format)
    return full.index_select(sharded.dim, torch.tensor(sharded.part(rank, ranks), device=full.device))


class Scopes:
    """The parameters that are local at present, and the hooks that replace and restore them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.inert = False
        self.rng: RegionRNG | None = None
        self.root: list[Slot] = []
        """Parameters outside the units."""
        self.units: dict[str, list[Slot]] = {}
        self._shadowed: dict[tuple[nn.Module, str], list[tuple[Any, Any]]] = {}
        """For each local parameter: the values it replaced in `__dict__`, outermost scope first (`...` for none), each
        with the parameter that it is part of."""
        self._shown: dict[tuple[nn.Module, str], Any] = {}
        """The parameters that the present local ones are parts of; `functional_call` replaces parameters."""
        self._calls: list[_UnitCall] = []

    def active(self) -> bool:
        """Returns False while hooks do nothing."""
        return not self.inert

    def enter_root(self) -> None:
        """Makes parameters outside the units local, before a step."""
        if not self.inert:
            self._shadow(self.root)

    def exit_root(self) -> None:
        """Restores all parameters, after a step or an exception in a step."""
        for module, key in self._shadowed:
            module.__dict__.pop(key, None)
        self._shadowed.clear()
        self._shown.clear()
        self._calls.clear()
        for slots in (self.root, *self.units.values()):
            _refresh_flat_weights(slots)

    def colwise_input(self, linear: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copies the input of a colwise linear to the ranks, once per unit call even if several linears use it."""
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
        """Records that a linear of the running unit was called."""
        if self._calls:
            self._calls[-1].ran.add(linear)

    def enter_region(self, name: str) -> None:
        """Switches to random numbers of this rank, at a colwise linear.

        Compiled blocks are excluded: their graphs cannot exchange the generator's state.
        """
        if self.rng is not None and not torch.compiler.is_compiling():
            self.rng.enter_region(name)

    def leave_region(self) -> None:
        """Switches back to common random numbers, after a rowwise linear."""
        if self.rng is not None and not torch.compiler.is_compiling():
            self.rng.leave_region()

    # ---- hooks

    def add_module(self, module: nn.Module, slots: list[Slot]) -> list[RemovableHandle]:
        """Adds hooks that make `slots` local if `module` is called outside its unit, as in a partial recomputation."""
        entered: list[Slot] = []

        def before(_: nn.Module, args: tuple) -> None:
            if not self.inert:
                missing = [slot for slot in slots if slot.key not in module.__dict__]
                if missing:
                    entered.extend(missing)
                    self._shadow(missing)

        def after(_: nn.Module, args: tuple, output: Any) -> None:
            if entered:
                self._unshadow(entered)
                entered.clear()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def add_unit(self, name: str, module: nn.Module, plan: UnitPlan) -> list[RemovableHandle]:
        """Adds hooks that make parameters, buffers and arguments of the unit `name` local while it runs."""
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
            parameter = own_parameters(slot.module).get(slot.key)
            if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
                continue  # not owned, or still sharded by `fully_shard`
            place = slot.module, slot.key
            present, of = slot.module.__dict__.get(slot.key, ...), self._shown.get(place)
            self._shadowed.setdefault(place, []).append((present, of))
            if present is not ... and (in_transform() or (slot.then is None and of is parameter)):
                # local since the step began: the tensor that `torch.autograd.grad` of the user is asked about
                continue
            to_local = parameter.to_local()
            self._shown[place] = parameter
            slot.module.__dict__[slot.key] = to_local if slot.then is None else slot.then(to_local)
        _refresh_flat_weights(slots)

    def _unshadow(self, slots: list[Slot]) -> None:
        for slot in slots:
            before = self._shadowed.get((slot.module, slot.key))
            if not before:
                continue
            value, self._shown[slot.module, slot.key] = before.pop()
            if value is ...:
                slot.module.__dict__.pop(slot.key, None)
            else:
                slot.module.__dict__[slot.key] = value
        _refresh_flat_weights(slots)

    def _shadow_buffers(self, unit: nn.Module, plan: UnitPlan) -> None:
        for name, sharded in plan.buffers.items():
            owner, _, key = name.rpartition(".")
            module = unit.get_submodule(owner)
            buffer = own_buffers(module).get(key)
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
                    f"`{path[-1]}` has {size} entries along dim {dim}, but the division of this block over ranks "
                    f"needs a multiple of {len(owners)}. Keep the shape of the first batch, or keep the block "
                    "whole with `tensor_plan`."
                )
            index = [i for i in range(size) if owners[i % len(owners)] == self.group.rank()]
            return select_on_rank(tensor, dim, torch.tensor(index, device=tensor.device), self.group)

        return map_tensors(to_local, args, ("args",)), map_tensors(to_local, kwargs, ("kwargs",))


class _UnitCall:
    """State of one running call of a unit."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ran: set[str] = set()


def _check_regions(unit: str, plan: UnitPlan, ran: set[str]) -> None:
    """Checks that linears of a region were all called or none; otherwise outputs were not summed over the ranks.

    Raises:
        RuntimeError: If only some linears of a region were called.
    """
    for region in plan.regions:
        missing = [name for name in region if name not in ran]
        if missing and len(missing) < len(region):
            raise RuntimeError(
                f"`{unit}` was divided over the `tp` axis with `{missing[0]}`, which its forward did not call in this "
                f"step, although it called `{next(n for n in region if n in ran)}`. The forward differs from that of "
                f"the dry run. Keep the block whole with `tensor_plan={{'{unit}.*': 'replicate'}}`."
            )


def _refresh_flat_weights(slots: list[Slot]) -> None:
    """Rebuilds the second list of weights that recurrent modules keep."""
    for module in {slot.module: None for slot in slots if isinstance(slot.module, nn.RNNBase)}:
        module.__dict__["_flat_weights"] = [getattr(module, key) for key in flat_weight_names(module)]
