"""The state of the user's code in a module: where it is, how to copy it, and what a step has changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_hybrid._torch_private import own_buffers
from lightning_hybrid.ghosts.contract import StatePlace
from lightning_hybrid.ghosts.objects import Copy
from lightning_hybrid.ghosts.outside import Outside
from lightning_hybrid.ghosts.rewind import Rewindable, is_consumable
from lightning_hybrid.spec.code import module_of

_OTHERS = ("lightning_hybrid.", "torch.", "lightning.", "pytorch_lightning.", "torchmetrics.")
"""Packages whose classes have no attributes of the user."""


class ModuleState:
    """The places of a module that hold state of the user's code.

    Args:
        root: The LightningModule.
    """

    def __init__(self, root: nn.Module) -> None:
        self._holders: dict[str, nn.Module] = {}
        classes: dict[type, None] = {}
        inside: set[int] = set()
        for name, module in root.named_modules():
            if id(module) in inside or isinstance(module, Metric | MetricCollection):
                inside |= {id(m) for m in module.modules()}
                continue  # metrics are synchronized by `metrics.torchmetrics`
            self._holders[name] = module
            classes |= dict.fromkeys(k for k in type(module).__mro__ if not f"{k.__module__}.".startswith(_OTHERS))
        self._outside = Outside(classes)
        classes |= self._outside.classes
        self._classes = {f"class {k.__module__}.{k.__qualname__}": k for k in classes if module_of(k) != "builtins"}

    def places(self, *, without: Collection[str] = ()) -> Iterator[tuple[StatePlace, Any]]:
        """Yields every place with what it holds, except for those of the modules named `without`."""
        framework = _framework()
        for name, module in self._holders.items():
            if name in without:
                continue
            for key, value in module.__dict__.items():
                if key not in framework and not isinstance(value, nn.Parameter):
                    yield StatePlace(name, key), value
            for key, value in own_buffers(module).items():
                yield StatePlace(name, key), value
        for name, kind in self._classes.items():
            for key, value in list(vars(kind).items()):
                if isinstance(value, _CLASS_STATE) and not key.startswith("__"):
                    yield StatePlace(name, key), value
        yield from self._outside.places()

    def owner(self, place: StatePlace) -> Any:
        """Returns the module, the class or the variables that have `place`."""
        owners = (self._holders, self._classes)
        return next((o[place.owner] for o in owners if place.owner in o), self._outside.variables(place.owner))

    def get(self, place: StatePlace) -> Any:
        """Returns what `place` holds; `MISSING` if it does not exist."""
        variables, holder = self._outside.variables(place.owner), self._holders.get(place.owner)
        if variables is not None:
            return variables.get(place.key, MISSING)
        if holder is None:
            return vars(self._classes[place.owner]).get(place.key, MISSING)
        return holder.__dict__.get(place.key, own_buffers(holder).get(place.key, MISSING))

    def set(self, place: StatePlace, value: Any) -> None:
        """Sets what `place` holds; `MISSING` removes the attribute."""
        variables, holder = self._outside.variables(place.owner), self._holders.get(place.owner)
        if variables is not None and value is MISSING:
            variables.pop(place.key, None)
        elif variables is not None:
            variables[place.key] = value
        elif holder is None and value is MISSING:
            delattr(self._classes[place.owner], place.key)
        elif holder is None:
            setattr(self._classes[place.owner], place.key, value)
        elif value is MISSING:
            holder.__dict__.pop(place.key, None)
            own_buffers(holder).pop(place.key, None)
        elif place.key in own_buffers(holder):
            own_buffers(holder)[place.key] = value
        else:
            holder.__dict__[place.key] = value

    @contextmanager
    def holding(self, values: Mapping[StatePlace, Any]) -> Iterator[None]:
        """Sets what places hold for the duration of the context."""
        kept = {place: self.get(place) for place in values}
        for place, value in values.items():
            self.set(place, value)
        try:
            yield
        finally:
            for place, value in kept.items():
                self.set(place, value)

    def copies(self) -> dict[StatePlace, Copy]:
        """Returns a copy of what every place holds; iterators become ones that can be set back."""
        for place, value in list(self.places()):
            if is_consumable(value):
                self.set(place, Rewindable(value))
        return {place: Copy(value) for place, value in self.places()}

    def restore(self, copies: dict[StatePlace, Copy]) -> None:
        """Gives every place back what it held, except for the values of tensors that were written in place."""
        for place, copy in copies.items():
            value = copy.restore()
            if self.get(place) is not value:
                self.set(place, value)
        for place, _ in list(self.places()):
            if place not in copies:
                self.set(place, MISSING)

    def changed(self, before: dict[StatePlace, Copy], written: Collection[torch.Tensor] = ()) -> list[StatePlace]:
        """Returns the places whose content is not that of `before`, or that hold one of the tensors `written`."""
        ids = {id(tensor) for tensor in written}
        found = [
            p for p, c in self.copies().items() if p not in before or id(c.value) in ids or not before[p].same_as(c)
        ]
        return found + [p for p in before if self.get(p) is MISSING]


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()
"""Stands for an attribute that does not exist."""
_CLASS_STATE = (int, float, str, bool, list, dict, set, torch.Tensor)


@cache
def _framework() -> frozenset[str]:
    """Returns the names of attributes that belong to torch, Lightning and this package."""
    ours = ("log", "log_dict", "forward", "load_state_dict", "__deepcopy__", "_hybrid_engine", "_hybrid_deferred_init")
    return frozenset({*vars(pl.LightningModule()), *ours, "_flat_weights", "_flat_weight_refs"})
