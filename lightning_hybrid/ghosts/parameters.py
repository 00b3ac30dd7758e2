"""The parameters that a rank holds; the others are ghosts in the module, under the same names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_hybrid._torch_private import own_parameters, refresh_flat_weights
from lightning_hybrid.ghosts.ghost import Ghost, Slot, ghost_like, parameter_slots
from lightning_hybrid.ghosts.reads import StageObserver


class Place(NamedTuple):
    """The place of a parameter in the module tree; unlike `Slot`, does not keep the tensor alive."""

    name: str
    module: nn.Module
    key: str


@contextmanager
def parameters_listed(seen: Callable[[], None]) -> Iterator[None]:
    """Calls `seen` when any module is asked for its parameters."""
    original: Any = nn.Module.named_parameters

    def named_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen()
        return original(self, *args, **kwargs)

    nn.Module.named_parameters = named_parameters  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.named_parameters = original  # type: ignore[method-assign]


class Parameters:
    """All parameters of a module by name, held or not; a shared parameter has one entry, under its first name.

    Ghosts are set in a module's `__dict__`, so `parameters()` and optimizers see only the parameters held by this rank.
    """

    def __init__(self, root: nn.Module) -> None:
        self.observer = StageObserver()
        """Of the ghosts in place of parameters, and of those that a pipeline stage computes with."""
        shared: dict[int, list[Slot]] = defaultdict(list)
        for slot in parameter_slots(root):
            shared[id(slot.tensor)].append(slot)
        self._visible: set[int] | None = None
        self.slots: dict[str, tuple[Place, ...]] = {}
        self.requires_grad: dict[str, bool] = {}
        for same in shared.values():
            first, value = same[0].name, same[0].tensor
            self.slots[first] = tuple(Place(slot.name, slot.module, slot.key) for slot in same)
            self.requires_grad[first] = value.requires_grad or (isinstance(value, Ghost) and value.wants_grad)
        owned: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for first, places in self.slots.items():
            for place in places:
                owned[id(place.module)].append((place.key, first))
        modules = root.named_modules(remove_duplicate=False)  # a module may have several names
        self.first_names = {
            f"{path}.{key}" if path else key: first for path, module in modules for key, first in owned[id(module)]
        }
        """The first name of the parameter at each name."""

    @property
    def names(self) -> list[str]:
        """Returns first names, in the order of `named_parameters`."""
        return list(self.slots)

    def inside(self, module: str) -> set[str]:
        """Returns first names of the parameters inside the submodule `module`."""
        return {n for n, places in self.slots.items() if any(slot.name.startswith(f"{module}.") for slot in places)}

    def __getitem__(self, name: str) -> torch.Tensor:
        slot = self.slots[name][0]
        return slot.module.__dict__[slot.key] if slot.key in slot.module.__dict__ else self.visible(name)

    def visible(self, name: str) -> torch.Tensor:
        """Returns the parameter or ghost registered at `name` at present."""
        slot = self.slots[name][0]
        return own_parameters(slot.module)[slot.key]  # type: ignore[return-value]

    def is_registered(self, name: str) -> bool:
        """Returns False if user code has removed the parameter from its module."""
        slot = self.slots[name][0]
        return slot.key in own_parameters(slot.module)

    def local(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that this rank holds, by first name."""
        return {n: self[n] for n in self.slots if not isinstance(self[n], Ghost)}  # type: ignore[misc]

    def registered(self) -> dict[Place, torch.Tensor | None]:
        """Returns what is at every place at present."""
        places = (place for places in self.slots.values() for place in places)
        return {
            place: own_parameters(place.module).get(place.key, place.module.__dict__.get(place.key)) for place in places
        }

    def put(self, name: str, value: torch.Tensor) -> None:
        """Sets a parameter or a ghost at every place of `name`."""
        for slot in self.slots[name]:
            # looked up each time, since FSDP and tensor parallelism replace the registered object
            own_parameters(slot.module).pop(slot.key, None)
            slot.module.__dict__.pop(slot.key, None)
            if isinstance(value, Ghost):
                slot.module.__dict__[slot.key] = value
            else:
                slot.module.register_parameter(slot.key, value)  # type: ignore[arg-type]

    def put_all(self, values: Mapping[str, torch.Tensor]) -> None:
        """Sets parameters and ghosts at every place of their names, in the original order of each module."""
        for name, value in values.items():
            self.put(name, value)
        modules = {slot.module: None for places in self.slots.values() for slot in places}
        self._sort(modules)
        for module in modules:
            refresh_flat_weights(module)

    def release(self, names: Collection[str], device: torch.device) -> None:
        """Replaces the parameters `names` by ghosts on `device`, which frees their memory."""
        for name in names:
            ghost = ghost_like(self[name], self.observer, device)
            ghost.requires_grad_(False)
            ghost.wants_grad = self.requires_grad[name]
            self.put(name, ghost)

    def make_ghosts(self, shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
        """Replaces every parameter by a ghost of the given shape, registered as a parameter.

        The module is then as one that was built with `RecordedInit`: it can be partitioned, and each rank makes its
        part real.
        """
        modules = {slot.module: None for places in self.slots.values() for slot in places}
        for name in self.names:
            present = self[name]
            meta = torch.empty(shapes[name], dtype=present.dtype, device="meta")
            ghost = ghost_like(nn.Parameter(meta, requires_grad=False), device=device)
            ghost.wants_grad = self.requires_grad[name]
            self.put(name, ghost)
            for slot in self.slots[name]:
                own_parameters(slot.module)[slot.key] = slot.module.__dict__.pop(slot.key)
        self._sort(modules)

    @contextmanager
    def all_visible(self) -> Iterator[set[int]]:
        """Registers ghosts as parameters, so that `configure_optimizers` sees every name and shape.

        Yields:
            The ids of the ghosts, which the caller removes from the optimizers' groups.
        """
        if self._visible is not None:
            yield self._visible
            return
        ghosts = {n: self[n] for n in self.slots if isinstance(self[n], Ghost)}
        orders = {slot.module: None for places in self.slots.values() for slot in places}
        for name, ghost in ghosts.items():
            ghost.requires_grad_(self.requires_grad[name])
            for slot in self.slots[name]:
                slot.module.__dict__.pop(slot.key)
                own_parameters(slot.module)[slot.key] = ghost  # type: ignore[assignment]
        self._sort(orders)
        self._visible = {id(g) for g in ghosts.values()}
        try:
            yield self._visible
        finally:
            self._visible = None
            for name, ghost in ghosts.items():
                ghost.requires_grad_(False)
                place = self.slots[name][0]
                if own_parameters(place.module).get(place.key) is ghost:  # else a hook has changed the layout
                    self.put(name, ghost)

    def _sort(self, modules: Mapping[nn.Module, None]) -> None:
        """Restores the original order of each module's parameters, by which optimizers number them."""
        orders: dict[nn.Module, list[str]] = {module: [] for module in modules}
        for places in self.slots.values():
            for slot in places:
                orders[slot.module].append(slot.key)
        for module, keys in orders.items():
            registered = own_parameters(module)
            present = dict(registered)
            registered.clear()
            for key in [*keys, *(k for k in present if k not in keys)]:
                if key in present:
                    registered[key] = present[key]
