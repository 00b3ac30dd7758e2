"""Applies a tensor plan to a module in place, and removes it.

Every owned parameter becomes a DTensor on the `tp` mesh, so that optimizers, clipping and `fully_shard` see one kind of
tensor. Modules compute with plain local tensors (`scopes`), and hooks on single modules communicate (`modules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.hooks import RemovableHandle

from lightning_hybrid._torch_private import own_parameters
from lightning_hybrid.spec.tensor_plan import ShardedParameter, TensorPlan, UnitPlan
from lightning_hybrid.tensor.attention import DividedAttention
from lightning_hybrid.tensor.attributes import attribute_entries
from lightning_hybrid.tensor.collectives import (
    all_gather,
    copy_to_ranks,
    divided_by_ranks,
    writable,
)
from lightning_hybrid.tensor.modules import (
    add_colwise,
    add_embedding,
    add_gather,
    add_row,
    add_selected_output,
    add_shared_output,
)
from lightning_hybrid.tensor.scopes import RegionRNG, Scopes, Slot, part_of
from lightning_hybrid.tensor.width import add_narrowing


class _Original(NamedTuple):
    """A parameter object of the user and its places in the module; its storage is empty while the plan is applied."""

    parameter: nn.Parameter
    places: list[tuple[str, nn.Module, str]]


def apply_tensor_plan(
    root: nn.Module,
    plan: TensorPlan,
    mesh: DeviceMesh,
    owned: Callable[[str], bool] = lambda name: True,
    divided: bool = False,
) -> TensorParallel:
    """Divides the weights of `root` according to `plan`.

    Args:
        root: The module that the plan was inferred for, with the same full weights on every rank.
        plan: The plan.
        mesh: The one-dimensional `tp` mesh.
        owned: Returns True for the parameters (by full name) of this rank's stage. The others, and tensors that are not
            registered as parameters, are not changed.
        divided: True if the weights of `root` are this rank's parts already (see `part_of`).

    Raises:
        ValueError: If `mesh` does not have one dim of size `plan.size`.
    """
    if mesh.ndim != 1 or mesh.size() != plan.size:
        raise ValueError(f"`mesh` must have one dim of size {plan.size}. Got shape {tuple(mesh.shape)}.")
    return TensorParallel(root, plan, mesh, owned, divided)


class TensorParallel:
    """An applied tensor plan, created by `apply_tensor_plan`."""

    def __init__(
        self, root: nn.Module, plan: TensorPlan, mesh: DeviceMesh, owned: Callable[[str], bool], divided: bool
    ) -> None:
        self.root, self.plan, self.mesh = root, plan, mesh
        self._group = mesh.get_group()
        self._handles: list[RemovableHandle] = []
        self._patched: list[tuple[nn.Module, str, Any]] = []
        self._originals: list[_Original] = []
        self._replace(owned, divided)
        self._kinds = self._local_kinds()
        self._scopes = Scopes(self._group)
        self._scopes.units = {name: [] for name in plan.units}
        self._install_scopes()
        for name, unit in plan.units.items():
            if self._scopes.units[name]:
                self._install_unit(name, unit)
        self._install_single_modules()

    # ---- weights

    def full_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Gathers the full tensor in the user's order, of a tensor laid out like parameter `name` (collective).

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
        """Shards a full tensor, equal on all ranks, to a DTensor on the `tp` mesh; the inverse of `full_tensor`."""
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
            for key, parameter in own_parameters(module).items():
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
        """Returns the function applied to the local part of each parameter that needs one."""
        kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        for unit, plan in self.plan.units.items():
            prefix = f"{unit}." if unit else ""
            kinds |= {prefix + name: lambda to_local: copy_to_ranks(to_local, self._group) for name in plan.partial}
            kinds |= {f"{prefix}{name}.bias": lambda bias: divided_by_ranks(bias, self._group) for name in plan.rowwise}
        for name in self.plan.attention:
            kinds[f"{name}.out_proj.bias"] = lambda bias: divided_by_ranks(bias, self._group)
        for name in self.plan.written:
            then = kinds.get(name)
            kinds[name] = writable if then is None else lambda to_local, then=then: writable(then(to_local))
        return kinds

    # ---- steps

    def use_rng(self, rng: RegionRNG) -> None:
        """Sets the source of random numbers inside divided regions."""
        self._scopes.rng = rng

    def enter_root(self) -> None:
        """Makes parameters outside the units local, before a step."""
        self._scopes.enter_root()

    def exit_root(self) -> None:
        """Restores all parameters, after a step or an exception in a step."""
        self._scopes.exit_root()

    @contextmanager
    def root_context(self) -> Iterator[None]:
        """Surrounds a step with `enter_root` and `exit_root`."""
        self.enter_root()
        try:
            yield
        finally:
            self.exit_root()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disables all hooks and restores the modules' attributes, for dry runs on ghosts."""
        before, self._scopes.inert = self._scopes.inert, True
        present = [(module, key, module.__dict__[key]) for module, key, _ in self._patched]
        self._restore_attributes()
        try:
            yield
        finally:
            self._scopes.inert = before
            for module, key, value in present:
                module.__dict__[key] = value

    # ---- hooks

    def _install_scopes(self) -> None:
        own_forward_only = {*self.plan.embeddings, *self.plan.gathered}
        by_module: dict[nn.Module, list[Slot]] = {}
        for name, module, key in (place for original in self._originals for place in original.places):
            slot = Slot(module, key, self._kinds.get(name))
            by_module.setdefault(module, []).append(slot)
            if name.rpartition(".")[0] in own_forward_only:
                continue  # no other code may use these weights; an error is better than a wrong result
            unit = _unit_of(name, self._scopes.units)
            if unit is not None:
                self._scopes.units[unit].append(slot)
            if unit is None or name in self.plan.used_outside:
                self._scopes.root.append(slot if unit is None else Slot(module, key, None))
        for module, slots in by_module.items():
            self._handles += self._scopes.add_module(module, slots)

    def _install_unit(self, name: str, plan: UnitPlan) -> None:
        unit, group, active, handles = self.root.get_submodule(name), self._group, self._scopes.active, self._handles
        handles += self._scopes.add_unit(name, unit, plan)
        for child in plan.colwise:
            handles.append(add_colwise(unit.get_submodule(child), partial(self._scopes.colwise_input, child), active))
        for child in plan.rowwise:
            handles.append(add_row(unit.get_submodule(child), group, active))
            handles.append(unit.get_submodule(child).register_forward_hook(self._leave_region))
        for child, channels in plan.shared_outputs.items():
            handles.append(add_shared_output(unit.get_submodule(child), channels, group, active))
        for child, parts in plan.selected_outputs.items():
            handles.append(add_selected_output(unit.get_submodule(child), parts, group, active))
        for child, width in plan.widths.items():
            handles += add_narrowing(unit.get_submodule(child), width, self.plan.size, active)
        for child in (*plan.rowwise, *plan.selected_outputs):
            handles.append(unit.get_submodule(child).register_forward_pre_hook(partial(self._note_call, child)))
        for owner, key, value in attribute_entries(unit, plan.attributes):
            self._patch(owner, key, value)

    def _leave_region(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._scopes.leave_region()

    def _note_call(self, linear: str, module: nn.Module, args: tuple) -> None:
        self._scopes.ran(linear)

    def _install_single_modules(self) -> None:
        local = {module for original in self._originals for _, module, _ in original.places}
        chosen = {name: self.root.get_submodule(name) for name in (*self.plan.embeddings, *self.plan.gathered)}
        for module in chosen.values():
            if module in local and isinstance(module, nn.Embedding):
                self._handles += add_embedding(module, self._group, self._scopes.active)
            elif module in local:
                self._install_gathered(module)
        for module in (self.root.get_submodule(name) for name in self.plan.attention):
            if module in local and isinstance(module, nn.MultiheadAttention):
                self._patch(module, "forward", DividedAttention(module, self._group, self._scopes))
        for module in self.root.modules() if self.plan.attention else ():
            if isinstance(module, nn.TransformerEncoder):
                self._patch(module, "use_nested_tensor", False)

    def _install_gathered(self, module: nn.Module) -> None:
        copied = partial(copy_to_ranks, group=self._group)
        self._handles.append(add_colwise(module, copied, self._scopes.active))
        self._handles.append(add_gather(module, self._group, self._scopes.active))
        if "nf" in module.__dict__:
            self._patch(module, "nf", module.__dict__["nf"] // self.plan.size)

    def _patch(self, module: nn.Module, key: str, value: Any) -> None:
        self._patched.append((module, key, module.__dict__.get(key, ...)))
        module.__dict__[key] = value

    def _restore_attributes(self) -> None:
        for module, key, value in reversed(self._patched):
            if value is ...:
                module.__dict__.pop(key, None)
            else:
                module.__dict__[key] = value

    # ---- removal

    def remove(self) -> None:
        """Restores the user's parameter objects with their present full values (collective)."""
        originals = self._originals
        self.remove_hooks()
        for original, places in originals:
            name, module, key = places[0]
            present = own_parameters(module)[key]
            if present is None:
                continue
            original.data = self.full_tensor(name, present.data)
            original.grad = None if present.grad is None else self.full_tensor(name, present.grad)
            original.requires_grad_(present.requires_grad)
            for _, place, place_key in places:
                _set_parameter(place, place_key, original)

    def remove_hooks(self) -> None:
        """Removes hooks and restores attributes; weights are not changed."""
        self.exit_root()
        for handle in self._handles:
            handle.remove()
        self._restore_attributes()
        self._handles, self._patched, self._originals = [], [], []


def _unit_of(name: str, units: dict[str, Any]) -> str | None:
    parts = name.split(".")
    for i in range(len(parts)):
        if ".".join(parts[:i]) in units:
            return ".".join(parts[:i])
    return None


def _set_parameter(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    if type(module).__setattr__ is nn.Module.__setattr__:
        own_parameters(module)[key] = parameter
    else:
        setattr(module, key, parameter)  # recurrent modules keep a second list of their weights
