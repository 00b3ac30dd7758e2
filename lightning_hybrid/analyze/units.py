"""Which modules are the blocks of a model, and at which module calls a model may be cut into stages.

A **unit** is a module that always runs whole on one stage; the entry of a unit call is a possible cut. Units are the
elements of the model's repeated stacks (its **blocks**) and the modules beside them (embedding, final norm, head). Units
never contain each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_hybrid._torch_private import intercept_calls, intercepted_call

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of one module, by name."""

    names: tuple[str, ...]
    """All units, in the order of `named_modules`."""
    blocks: tuple[str, ...]
    """Those that are elements of a repeated stack."""


def find_units(root: nn.Module) -> Units:
    """Finds the units of `root` from its module tree alone; nothing is run."""
    names: list[str] = []
    blocks: list[str] = []
    seen: set[int] = set()

    def add(name: str, module: nn.Module, block: bool) -> None:
        if id(module) in seen or isinstance(module, (Metric, MetricCollection)):
            return
        seen.add(id(module))
        names.append(name)
        if block:
            blocks.append(name)

    stacked = _has_stack(root)

    def is_trunk(child: nn.Module, parent: nn.Module) -> bool:
        """Without any stack, the child that holds most of the weights is opened in search of places to cut."""
        share = _size(child) / max(1, _size(parent))
        return len(list(child.children())) > 0 and (share == 1 or (share > 0.5 and not stacked))

    def elements(name: str, module: nn.Module) -> None:
        kinds = Counter(type(child) for child in module.children() if _has_parameters(child))
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(child, _CONTAINERS) and len(list(child.children())) > 0:
                elements(path, child)
            else:
                add(path, child, kinds[type(child)] >= 2)

    def walk(name: str, module: nn.Module, trunk: bool) -> None:
        if isinstance(module, _CONTAINERS):
            elements(name, module)
        elif trunk or _has_stack(module):
            children = [(n, c) for n, c in module.named_children() if not isinstance(c, (Metric, MetricCollection))]
            for child_name, child in children:
                walk(f"{name}.{child_name}" if name else child_name, child, trunk and is_trunk(child, module))
        else:
            add(name, module, False)

    walk("", root, True)
    return Units(names=tuple(names), blocks=tuple(blocks))


def _has_parameters(module: nn.Module) -> bool:
    return _size(module) > 0  # ghosts stand in `__dict__` and count


def _size(module: nn.Module) -> int:
    values = {id(v): v for m in module.modules() for v in [*m._parameters.values(), *m.__dict__.values()]}
    return sum(v.numel() for v in values.values() if isinstance(v, nn.Parameter))


def _has_stack(module: nn.Module) -> bool:
    for child in module.modules():
        if isinstance(child, _CONTAINERS):
            kinds = Counter(type(c) for c in child.children() if _has_parameters(c))
            if any(count >= 2 for count in kinds.values()):
                return True
    return False


class CallHandler(Protocol):
    """What takes over the calls of units and metrics while it is active."""

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Instead of the unit `name` being called with `args` and `kwargs`."""
        ...

    def metric_call(self, metric: Metric, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Instead of a torchmetrics object being called or updated."""
        ...


@dataclass
class CallSwitch:
    """Hands the calls of the units (and metrics) of `root` to the active handler; inactive, they run as ever."""

    root: nn.Module
    units: Units
    active: CallHandler | None = None
    _taken: list[Callable[[], None]] = field(default_factory=list)
    _originals: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def install(self) -> None:
        """Starts intercepting."""
        for name in self.units.names:
            self._take(name, self.root.get_submodule(name))
        for module in self.root.modules():
            if isinstance(module, (Metric, MetricCollection)):
                self._take_metric(module)

    def remove(self) -> None:
        """Stops intercepting; the modules are as before."""
        while self._taken:
            self._taken.pop()()

    def compile(self, names: Iterable[str]) -> None:
        """Compiles these units; they stay intercepted."""
        for name in names:
            self._originals[name] = torch.compile(self._originals[name])

    @contextmanager
    def handled_by(self, handler: CallHandler) -> Iterator[None]:
        """Inside, `handler` gets the calls."""
        before, self.active = self.active, handler
        try:
            yield
        finally:
            self.active = before

    def _take(self, name: str, module: nn.Module) -> None:
        compiled = module._compiled_call_impl
        originals = self._originals
        originals[name] = intercepted_call(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.active is None:
                return originals[name](*args, **kwargs)
            return self.active.unit_call(name, originals[name], args, kwargs)

        intercept_calls(module, call)
        self._taken.append(lambda: intercept_calls(module, compiled))

    def _take_metric(self, metric: Any) -> None:
        compiled = metric._compiled_call_impl
        original, update = intercepted_call(metric), metric.update

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.active is None:
                return original(*args, **kwargs)
            return self.active.metric_call(metric, original, args, kwargs)

        def updated(*args: Any, **kwargs: Any) -> Any:
            if self.active is None:
                return update(*args, **kwargs)
            return self.active.metric_call(metric, update, args, kwargs)

        intercept_calls(metric, call)
        had = metric.__dict__.get("update")
        metric.__dict__["update"] = updated

        def undo() -> None:
            intercept_calls(metric, compiled)
            if had is None:
                del metric.__dict__["update"]
            else:
                metric.__dict__["update"] = had

        self._taken.append(undo)
