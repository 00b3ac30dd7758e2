"""Finds the blocks of a model and the module calls at which it may be cut into stages; intercepts these calls.

A **unit** is a module that always runs whole on one stage; the entry of a unit call is a possible cut. Units are the
elements of the model's repeated stacks (its **blocks**) and the modules beside them (embedding, final norm, head).
Units never contain each other. An element of a stack with a backward hook is a unit, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_hybrid._torch_private import (
    backward_hooks_of,
    in_transform,
    intercepted_call,
    interception,
    own_parameters,
)
from lightning_hybrid.patching import Patches

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of one module, by name."""

    names: tuple[str, ...]
    """All units, in the order of `named_modules`."""
    blocks: tuple[str, ...]
    """The units that are elements of a repeated stack."""


def find_units(root: nn.Module) -> Units:
    """Finds the units of `root` from its module tree, without running it."""
    search = _Search(root)
    search.walk("", root, True)
    return Units(names=tuple(search.names), blocks=tuple(search.blocks))


class _Search:
    """Walks down the module tree to its units."""

    def __init__(self, root: nn.Module) -> None:
        self.names: list[str] = []
        self.blocks: list[str] = []
        self._seen: set[int] = set()
        self._stacked = _has_stack(root)

    def walk(self, name: str, module: nn.Module, trunk: bool) -> None:
        """Adds the units of `module`.

        Args:
            name: The full name of `module`.
            module: The module.
            trunk: True on the path from the root whose modules are all searched.
        """
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
            if isinstance(child, _CONTAINERS) and len(list(child.children())) > 0 and not backward_hooks_of(child):
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
        """Returns True for a child with all weights of `parent`, or without any stack with more than half of them."""
        share = _size(child) / max(1, _size(parent))
        return len(list(child.children())) > 0 and (share == 1 or (share > 0.5 and not self._stacked))


def _size(module: nn.Module) -> int:
    values = {id(v): v for m in module.modules() for v in [*own_parameters(m).values(), *m.__dict__.values()]}
    return sum(v.numel() for v in values.values() if isinstance(v, nn.Parameter))


def _has_stack(module: nn.Module) -> bool:
    for child in module.modules():
        if isinstance(child, _CONTAINERS):
            kinds = Counter(type(c) for c in child.children() if _size(c))
            if any(count >= 2 for count in kinds.values()):
                return True
    return False


class CallHandler(Protocol):
    """Handles the calls of units and metrics while active."""

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Handles a call of the unit `name`, instead of `call(*args, **kwargs)`."""
        ...

    def metric_call(
        self, metric: Metric, kind: Literal["forward", "update"], call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """Handles a call (`forward`) or an update of a torchmetrics object, instead of `call(*args, **kwargs)`."""
        ...


class UnitRNG(Protocol):
    """Gives units their random numbers."""

    def enter_unit(self) -> int | None:
        """Called before a unit runs; returns the argument of `leave_unit`."""
        ...

    def leave_unit(self, seed: int | None) -> None:
        """Called after the unit has returned."""
        ...


@dataclass
class CallInterceptor:
    """Routes calls of the units and metrics of `root` to the active handler; without one they run unchanged."""

    root: nn.Module
    units: Units
    active: CallHandler | None = None
    watcher: Callable[[str, Any], None] | None = None
    """Called with the name of a unit and its output after each call; None: not called."""
    rng: UnitRNG | None = None
    """Entered at every unit call, with any handler, and at recomputations in the backward pass."""
    _patches: Patches = field(default_factory=Patches)
    _originals: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def install(self) -> None:
        """Starts intercepting calls."""
        for name in self.units.names:
            self._intercept(name, self.root.get_submodule(name))
        for module in self.root.modules():
            if isinstance(module, (Metric, MetricCollection)):
                self._intercept_metric(module)
        self._patches.apply()

    def resume(self) -> None:
        """Intercepts calls again after `suspend`."""
        self._patches.apply()

    def suspend(self) -> None:
        """Stops intercepting calls; the modules are as before `install`."""
        self._patches.restore()

    def remove(self) -> None:
        """Stops intercepting calls permanently."""
        self._patches.restore()
        self._patches = Patches()

    def wrap(self, names: Iterable[str], wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Wraps the calls of the units `names` by `wrapper` (compilation, recomputation); they stay intercepted."""
        for name in names:
            self._originals[name] = wrapper(self._originals[name])

    @contextmanager
    def handled_by(self, handler: CallHandler) -> Iterator[None]:
        """Routes the calls to `handler` for the duration of the context."""
        before, self.active = self.active, handler
        try:
            yield
        finally:
            self.active = before

    def _intercept(self, name: str, module: nn.Module) -> None:
        originals = self._originals
        originals[name] = intercepted_call(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            seed = None if self.rng is None else self.rng.enter_unit()
            if self.active is None or in_transform():  # inside a transform it is code of the caller
                out = originals[name](*args, **kwargs)
            else:
                out = self.active.unit_call(name, originals[name], args, kwargs)
            if self.rng is not None:
                self.rng.leave_unit(seed)
            if self.watcher is not None:
                self.watcher(name, out)
            return out

        self._patches.add(module, **interception(call))

    def _intercept_metric(self, metric: Any) -> None:
        original, update = intercepted_call(metric), metric.update

        def called(*args: Any, **kwargs: Any) -> Any:
            if self.active is None:
                return original(*args, **kwargs)
            return self.active.metric_call(metric, "forward", original, args, kwargs)

        def updated(*args: Any, **kwargs: Any) -> Any:
            if self.active is None:
                return update(*args, **kwargs)
            return self.active.metric_call(metric, "update", update, args, kwargs)

        self._patches.add(metric, update=updated, **interception(_NotCopied(called)))


class _NotCopied:
    """A function that `deepcopy` replaces by None, so that copies of metrics are not intercepted."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> None:
        return None
