"""Applies a tensor plan to a module in place, and takes it off again.

Every owned parameter becomes a DTensor on the `tp` mesh, so that optimizers, clipping and `fully_shard` see one kind of
tensor. Modules compute with plain local tensors: while a unit (or the step, for what lies outside the units) runs, each
parameter is shadowed in its module's `__dict__`, where attribute lookup goes first, by its local part. Parameters are
looked up at each entry, since `fully_shard` exchanges them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.hooks import RemovableHandle

from lightning_hybrid.analyze.tensor_attributes import attribute_entries
from lightning_hybrid.analyze.tensor_numbers import map_tensors
from lightning_hybrid.analyze.tensor_width import NarrowTensor, add_narrowing
from lightning_hybrid.partition.tensor_attention import DividedAttention
from lightning_hybrid.partition.tensor_collectives import (
    all_gather,
    copy_to_ranks,
    divided_by_ranks,
    select_on_rank,
)
from lightning_hybrid.partition.tensor_modules import (
    add_column,
    add_embedding,
    add_gather,
    add_row,
    add_selected_output,
    add_shared_output,
)
from lightning_hybrid.spec.tensor_plan import ShardedParameter, TensorPlan, UnitPlan


class _Slot(NamedTuple):
    """A parameter of a module and how its local part is made."""

    module: nn.Module
    key: str
    local: Callable[[torch.Tensor], torch.Tensor] | None


class _Original(NamedTuple):
    """A parameter object of the user's and where it stood; its storage is empty while the plan is applied."""

    parameter: nn.Parameter
    places: list[tuple[str, nn.Module, str]]


def apply_tensor_plan(
    root: nn.Module,
    plan: TensorPlan,
    mesh: DeviceMesh,
    owned: Callable[[str], bool] = lambda name: True,
    divided: bool = False,
) -> TensorParallel:
    """Divides the weights of `root` as `plan` says.

    Args:
        root: The module that the plan was inferred for, with the same full weights on every rank.
        plan: The plan.
        mesh: The one-dimensional `tp` mesh.
        owned: Whether this rank's stage owns a parameter, by full name. The others, and those that are not in
            `_parameters`, are left alone.
        divided: Whether the weights of `root` are this rank's parts already (see `part_of`).
    """
    if mesh.ndim != 1 or mesh.size() != plan.size:
        raise ValueError(f"`mesh` must have one dim of size {plan.size}. Got shape {tuple(mesh.shape)}.")
    return TensorParallel(root, plan, mesh, owned, divided)


def part_of(full: torch.Tensor, sharded: ShardedParameter, rank: int, ranks: int) -> torch.Tensor:
    """The part of a full weight that `rank` of `ranks` holds, as a copy."""
    if sharded.order is None:
        length = sharded.size // ranks
        return full.narrow(sharded.dim, rank * length, length).clone(memory_format=torch.contiguous_format)
    return full.index_select(sharded.dim, torch.tensor(sharded.part(rank, ranks), device=full.device))


class TensorParallel:
    """An applied plan; see the module docstring. Made by `apply_tensor_plan`."""

    def __init__(
        self, root: nn.Module, plan: TensorPlan, mesh: DeviceMesh, owned: Callable[[str], bool], divided: bool
    ) -> None:
        self.root, self.plan, self.mesh = root, plan, mesh
        self._group = mesh.get_group()
        self._inert = False
        self._handles: list[RemovableHandle] = []
        self._patched: list[tuple[nn.Module, str, Any]] = []
        self._originals: list[_Original] = []
        self._memos: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = []
        self._shadowed: dict[tuple[nn.Module, str], None] = {}
        self._replace(owned, divided)
        self._kinds = self._local_kinds()
        self._root_scope: list[_Slot] = []
        self._scopes: dict[str, list[_Slot]] = {name: [] for name in plan.units}
        self._install_scopes()
        for name, unit in plan.units.items():
            self._install_unit(name, unit)
        self._install_single_modules()

    # ---- weights

    def full_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The full tensor in the user's order, of any tensor laid out like parameter `name` (collective).

        Args:
            name: Any name of the parameter.
            tensor: A DTensor (on any mesh that has the `tp` axis), or this rank's local part as a plain tensor.
        """
        sharded = self.plan.parameters.get(name)
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        elif sharded is not None:
            tensor = all_gather(tensor, sharded.dim, self._group)
        if sharded is None or sharded.order is None:
            return tensor
        inverse = torch.empty(sharded.size, dtype=torch.long)
        inverse[torch.tensor(sharded.order)] = torch.arange(sharded.size)
        return tensor.index_select(sharded.dim, inverse.to(tensor.device))

    def shard(self, name: str, full: torch.Tensor) -> DTensor:
        """The reverse of `full_tensor`: a DTensor on the `tp` mesh; every rank gives the same full tensor."""
        sharded = self.plan.parameters.get(name)
        return self._from_part(name, full if sharded is None else self._part(full, sharded))

    def _from_part(self, name: str, part: torch.Tensor) -> DTensor:
        sharded = self.plan.parameters.get(name)
        placement = Replicate() if sharded is None else Shard(sharded.dim)
        return DTensor.from_local(part, self.mesh, [placement], run_check=False)

    def _part(self, full: torch.Tensor, sharded: ShardedParameter) -> torch.Tensor:
        return part_of(full, sharded, self.mesh.get_local_rank(), self.plan.size)

    def _replace(self, owned: Callable[[str], bool], divided: bool) -> None:
        originals: dict[int, _Original] = {}
        for prefix, module in self.root.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    original = originals.setdefault(id(parameter), _Original(parameter, []))
                    original.places.append((f"{prefix}.{key}" if prefix else key, module, key))
        originals = {i: o for i, o in originals.items() if any(owned(name) for name, _, _ in o.places)}
        for parameter, places in originals.values():
            name = places[0][0]
            data = self._from_part(name, parameter.data) if divided else self.shard(name, parameter.data)
            replacement = nn.Parameter(data, requires_grad=parameter.requires_grad)
            for _, module, key in places:
                _set_parameter(module, key, replacement)
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            parameter.grad = None
        self._originals = list(originals.values())

    def _local_kinds(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """By parameter: what is done to its local part."""
        kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        for unit, plan in self.plan.units.items():
            prefix = f"{unit}." if unit else ""
            kinds |= {prefix + name: lambda local: copy_to_ranks(local, self._group) for name in plan.partial}
            kinds |= {f"{prefix}{name}.bias": lambda bias: divided_by_ranks(bias, self._group) for name in plan.rows}
        for name in self.plan.attention:
            kinds[f"{name}.out_proj.bias"] = lambda bias: divided_by_ranks(bias, self._group)
        return kinds

    # ---- local parts

    def _local(self, slot: _Slot) -> torch.Tensor | None:
        parameter = slot.module._parameters.get(slot.key)
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
            return None  # not owned, or still sharded by `fully_shard`
        local = parameter.to_local()
        return local if slot.local is None else slot.local(local)

    def _shadow(self, slots: list[_Slot]) -> None:
        for slot in slots:
            local = self._local(slot)
            if local is not None:
                slot.module.__dict__[slot.key] = local
                self._shadowed[slot.module, slot.key] = None
        for module in {slot.module: None for slot in slots if isinstance(slot.module, nn.RNNBase)}:
            module.__dict__["_flat_weights"] = [getattr(module, key) for key in module._flat_weights_names]

    def _unshadow(self, slots: list[_Slot]) -> None:
        for slot in slots:
            if (slot.module, slot.key) in self._shadowed:
                del self._shadowed[slot.module, slot.key]
                slot.module.__dict__.pop(slot.key, None)
        for module in {slot.module: None for slot in slots if isinstance(slot.module, nn.RNNBase)}:
            module.__dict__["_flat_weights"] = [getattr(module, key) for key in module._flat_weights_names]

    def enter_root(self) -> None:
        """Before a step: parameters outside the units become local."""
        if not self._inert:
            self._shadow(self._root_scope)

    def exit_root(self) -> None:
        """After a step, also one that was left by an exception: nothing is local any more."""
        self._unshadow(self._root_scope)
        for scope in self._scopes.values():
            self._unshadow(scope)
        self._memos.clear()

    @contextmanager
    def root_context(self) -> Iterator[None]:
        """`enter_root` and `exit_root` around a step."""
        self.enter_root()
        try:
            yield
        finally:
            self.exit_root()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, modules have their own attributes and all hooks do nothing (dry runs on ghosts)."""
        before, self._inert = self._inert, True
        present = [(module, key, module.__dict__[key]) for module, key, _ in self._patched]
        self._restore_attributes()
        try:
            yield
        finally:
            self._inert = before
            for module, key, value in present:
                module.__dict__[key] = value

    def _active(self) -> bool:
        return not self._inert

    # ---- hooks

    def _install_scopes(self) -> None:
        places = [place for original in self._originals for place in original.places]
        own_forward_only = {*self.plan.embeddings, *self.plan.gathered}
        by_module: dict[nn.Module, list[_Slot]] = {}
        for name, module, key in places:
            slot = _Slot(module, key, self._kinds.get(name))
            by_module.setdefault(module, []).append(slot)
            if name.rpartition(".")[0] in own_forward_only:
                continue  # nothing else may use these weights; an error is better than a wrong number
            unit = _unit_of(name, self._scopes)
            (self._root_scope if unit is None else self._scopes[unit]).append(slot)
        for module, slots in by_module.items():
            self._install_own_scope(module, slots)

    def _install_own_scope(self, module: nn.Module, slots: list[_Slot]) -> None:
        """A module called outside its unit (a recomputed part of it) makes its own parameters local."""
        made: list[_Slot] = []

        def before(_: nn.Module, args: tuple) -> None:
            if not self._inert:
                missing = [slot for slot in slots if slot.key not in module.__dict__]
                if missing:
                    made.extend(missing)
                    self._shadow(missing)

        def after(_: nn.Module, args: tuple, output: Any) -> None:
            if made:
                self._unshadow(made)
                made.clear()

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _install_unit(self, name: str, plan: UnitPlan) -> None:
        slots = self._scopes[name]
        if not slots:
            return
        module = self.root.get_submodule(name)

        def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
            if self._inert:
                return None
            self._shadow(slots)
            self._shadow_buffers(module, plan)
            self._memos.append({})
            if not plan.slices and not plan.shared_arguments:
                return None
            return self._local_arguments(plan, args, kwargs)

        def after(_: nn.Module, args: tuple, output: Any) -> None:
            if self._inert:
                return
            self._unshadow(slots)
            for buffer in plan.buffers:
                owner, _, key = buffer.rpartition(".")
                module.get_submodule(owner).__dict__.pop(key, None)
            if self._memos:
                self._memos.pop()

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, always_call=True))
        for child in plan.columns:
            self._handles.append(add_column(module.get_submodule(child), self._copied, self._active))
        for child in plan.rows:
            self._handles.append(add_row(module.get_submodule(child), self._group, self._active))
        for child, channels in plan.shared_outputs.items():
            submodule = module.get_submodule(child)
            self._handles.append(add_shared_output(submodule, channels, self._group, self._active))
        for child, parts in plan.selected_outputs.items():
            submodule = module.get_submodule(child)
            self._handles.append(add_selected_output(submodule, parts, self._group, self._active))
        for child, width in plan.widths.items():
            self._handles += add_narrowing(module.get_submodule(child), width, self.plan.size, self._active)
        for owner, key, value in attribute_entries(module, plan.attributes):
            self._patch(owner, key, value)

    def _install_single_modules(self) -> None:
        owners = {module for original in self._originals for _, module, _ in original.places}
        for name in self.plan.embeddings:
            module = self.root.get_submodule(name)
            if module in owners and isinstance(module, nn.Embedding):
                self._handles += add_embedding(module, self._group, self._active)
        for name in self.plan.gathered:
            module = self.root.get_submodule(name)
            if module in owners:
                copied = lambda tensor: copy_to_ranks(tensor, self._group)  # noqa: E731
                self._handles.append(add_column(module, copied, self._active))
                self._handles.append(add_gather(module, self._group, self._active))
                if "nf" in module.__dict__:
                    self._patch(module, "nf", module.__dict__["nf"] // self.plan.size)
        for name in self.plan.attention:
            module = self.root.get_submodule(name)
            if module in owners and isinstance(module, nn.MultiheadAttention):
                self._patch(module, "forward", DividedAttention(module, self._group))
        if self.plan.attention:
            for module in self.root.modules():
                if isinstance(module, nn.TransformerEncoder):
                    self._patch(module, "use_nested_tensor", False)

    def _patch(self, module: nn.Module, key: str, value: Any) -> None:
        self._patched.append((module, key, module.__dict__.get(key, ...)))
        module.__dict__[key] = value

    def _restore_attributes(self) -> None:
        for module, key, value in reversed(self._patched):
            if value is ...:
                module.__dict__.pop(key, None)
            else:
                module.__dict__[key] = value

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """The input of a column, copied to the ranks once in a unit call however many columns use it."""
        if isinstance(tensor, NarrowTensor):
            tensor = tensor.whole
        if not self._memos or not (torch.is_grad_enabled() and tensor.requires_grad):
            return copy_to_ranks(tensor, self._group)
        known = self._memos[-1].get(id(tensor))
        if known is None or known[0] is not tensor:
            known = self._memos[-1][id(tensor)] = tensor, copy_to_ranks(tensor, self._group)
        return known[1]

    def _shadow_buffers(self, unit: nn.Module, plan: UnitPlan) -> None:
        for name, sharded in plan.buffers.items():
            owner, _, key = name.rpartition(".")
            module = unit.get_submodule(owner)
            buffer = module._buffers.get(key)
            if buffer is not None:
                module.__dict__[key] = self._part(buffer, sharded)

    def _local_arguments(self, plan: UnitPlan, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        slices = {cut.path: cut for cut in plan.slices}
        rank = self.mesh.get_local_rank()

        def local(path: Any, tensor: torch.Tensor) -> torch.Tensor:
            if path in slices:
                cut = slices[path]
                size = tensor.shape[cut.dim]
                if size == 1 or size % len(cut.owners):
                    raise ValueError(
                        f"An argument of a block has {size} entries along dim {cut.dim}; the tensor plan needs a "
                        f"multiple of {len(cut.owners)}."
                    )
                index = [i for i in range(size) if cut.owners[i % len(cut.owners)] == rank]
                return select_on_rank(tensor, cut.dim, torch.tensor(index, device=tensor.device), self._group)
            return copy_to_ranks(tensor, self._group) if path in plan.shared_arguments else tensor

        return map_tensors(local, args, ("args",)), map_tensors(local, kwargs, ("kwargs",))

    # ---- taking it off

    def remove(self) -> None:
        """Puts the user's own parameter objects back, with their present full values (collective)."""
        self.exit_root()
        for handle in self._handles:
            handle.remove()
        self._restore_attributes()
        for original, places in self._originals:
            name, module, key = places[0]
            present = module._parameters[key]
            if present is None:
                continue
            original.data = self.full_tensor(name, present.data)
            original.grad = None if present.grad is None else self.full_tensor(name, present.grad)
            original.requires_grad_(present.requires_grad)
            for _, place, place_key in places:
                _set_parameter(place, place_key, original)
        self._handles, self._patched, self._originals = [], [], []


def _unit_of(name: str, units: dict[str, Any]) -> str | None:
    parts = name.split(".")
    for i in range(len(parts)):
        if ".".join(parts[:i]) in units:
            return ".".join(parts[:i])
    return None


def _set_parameter(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[key] = parameter
    else:
        setattr(module, key, parameter)  # recurrent modules keep a second list of their weights
