"""Which modules are the blocks of a model, and at which module calls a model may be cut into stages.

A **unit** is a module that always runs whole on one stage; the entry of a unit call is a possible cut. Units are the
elements of the model's repeated stacks (its **blocks**) and the modules beside them (embedding, final norm, head).
Units never contain each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

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
    search = _Search(root)
    search.walk("", root, True)
    return Units(names=tuple(search.names), blocks=tuple(search.blocks))


class _Search:
    """Walks down the module tree until it meets units."""

    def __init__(self, root: nn.Module) -> None:
        self.names: list[str] = []
        self.blocks: list[str] = []
        self._seen: set[int] = set()
        self._stacked = _has_stack(root)

    def walk(self, name: str, module: nn.Module, trunk: bool) -> None:
        """`trunk`: on the path from the root along which every module is opened."""
        if isinstance(module, _CONTAINERS):
            self._elements(name, module)
        elif trunk or _has_stack(module):
            for key, child in module.named_children():
                self.walk(f"{name}.{key}" if name else key, child, trunk and self._is_trunk(child, module))
        else:
            self._add(name, module, False)

    def _elements(self, name: str, container: nn.Module) -> None:
        kinds = Counter(type(child) for child in container.children() if _size(child))
        for key, child in container.named_children():
            path = f"{name}.{key}" if name else key
            if isinstance(child, _CONTAINERS) and len(list(child.children())) > 0:
                self._elements(path, child)
            else:
                self._add(path, child, kinds[type(child)] >= 2)

    def _add(self, name: str, module: nn.Module, block: bool) -> None:
        if id(module) in self._seen or isinstance(module, Metric | MetricCollection):
            return
        self._seen.add(id(module))
        self.names.append(name)
        if block:
            self.blocks.append(name)

    def _is_trunk(self, child: nn.Module, parent: nn.Module) -> bool:
        """Without any stack, the child that holds most of the weights is opened in search of places to cut."""
        share = _size(child) / max(1, _size(parent))
        return len(list(child.children())) > 0 and (share == 1 or (share > 0.5 and not self._stacked))


def _size(module: nn.Module) -> int:
    values = {id(v): v for m in module.modules() for v in [*m._parameters.values(), *m.__dict__.values()]}
    return sum(v.numel() for v in values.values() if isinstance(v, nn.Parameter))


def _has_stack(module: nn.Module) -> bool:
    for child in module.modules():
        if isinstance(child, _CONTAINERS):
            kinds = Counter(type(c) for c in child.children() if _size(c))
            if any(count >= 2 for count in kinds.values()):
                return True
    return False


class CallHandler(Protocol):
    """What takes over the calls of units and metrics while it is active."""

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Instead of the unit `name` being called with `args` and `kwargs`."""
        ...

    def metric_call(
        self, metric: Metric, kind: Literal["forward", "update"], call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """Instead of a torchmetrics object being called (`forward`) or updated."""
        ...


class UnitRNG(Protocol):
    """What gives units their random numbers."""

    def enter_unit(self) -> int | None:
        """A unit is called; returns what `leave_unit` needs."""
        ...

    def leave_unit(self, seed: int | None) -> None:
        """The unit has returned."""
        ...


@dataclass
class CallInterceptor:
    """Hands the calls of the units (and metrics) of `root` to the active handler; inactive, they run as ever."""

    root: nn.Module
    units: Units
    active: CallHandler | None = None
    streams: UnitRNG | None = None
    """Told of every unit call, whoever handles it; also when a unit is recomputed in the backward pass."""
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

    def wrap(self, names: Iterable[str], wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Has these units run as `wrapper` makes them, compiled or recomputed; they stay intercepted."""
        for name in names:
            self._originals[name] = wrapper(self._originals[name])

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
            seed = None if self.streams is None else self.streams.enter_unit()
            if self.active is None:
                out = originals[name](*args, **kwargs)
            else:
                out = self.active.unit_call(name, originals[name], args, kwargs)
            if self.streams is not None:
                self.streams.leave_unit(seed)
            return out

        intercept_calls(module, call)
        self._taken.append(lambda: intercept_calls(module, compiled))

    def _take_metric(self, metric: Any) -> None:
        compiled = metric._compiled_call_impl
        original, update = intercepted_call(metric), metric.update

        def called(*args: Any, **kwargs: Any) -> Any:
            if self.active is None:
                return original(*args, **kwargs)
            return self.active.metric_call(metric, "forward", original, args, kwargs)

        def updated(*args: Any, **kwargs: Any) -> Any:
            if self.active is None:
                return update(*args, **kwargs)
            return self.active.metric_call(metric, "update", update, args, kwargs)

        intercept_calls(metric, _NotCopied(called))
        had = metric.__dict__.get("update")
        metric.__dict__["update"] = updated

        def undo() -> None:
            intercept_calls(metric, compiled)
            if had is None:
                del metric.__dict__["update"]
            else:
                metric.__dict__["update"] = had

        self._taken.append(undo)


class _NotCopied:
    """A function that a copy of its owner does without: copies of metrics (by `deepcopy`) are called as ever."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> None:
        return None
