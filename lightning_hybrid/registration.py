"""Lightning's names for the strategy: `Trainer(strategy="hybrid")` and, with a layout, `"hybrid-tp2-pp2"`.

Names are registered in both packages of Lightning, `lightning.pytorch` and `pytorch_lightning`, without importing them:
at once in a package that has been imported, otherwise as soon as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULES = ("lightning.pytorch.strategies", "pytorch_lightning.strategies")
"""Modules of Lightning with a `StrategyRegistry`."""


def register_strategy(name: str, make: Callable[..., Any], description: str) -> None:
    """Registers a strategy under `name`, and under `name` followed by `-` and any layout.

    Args:
        name: The name for `Trainer(strategy=name)`.
        make: Returns the strategy for a `layout`, or for none.
        description: A description for the registry.
    """
    for module in _MODULES:
        _when_imported(module, partial(_register, name, make, description))


def _register(name: str, make: Callable[..., Any], description: str, module: ModuleType) -> None:
    module.StrategyRegistry.register(name, make, description=description)
    with_layout = _WithLayout(f"{name}-LAYOUT")
    with_layout.of(module.StrategyRegistry, f"{name}-", make)
    module.StrategyRegistry.register(with_layout, make, description=f"{description}, in a layout", layout="LAYOUT")


class _WithLayout(str):
    """An entry of a registry that stands for all layouts: it equals each text that begins with its prefix.

    A Trainer looks for its `strategy` in the list of registered names, and then gets the entry by its hash. The
    comparison in the list registers the name, so that it is there.
    """

    def of(self, registry: Any, prefix: str, make: Callable[..., Any]) -> None:
        """Sets the registry, and what to register there."""
        self._registry, self._prefix, self._make = registry, prefix, make

    def __eq__(self, other: object) -> bool:
        if other is self:
            return True
        if not isinstance(other, str) or not other.startswith(self._prefix):
            return False
        if other not in self._registry:
            self._registry.register(other, self._make, layout=other.removeprefix(self._prefix))
        return True

    __hash__ = str.__hash__


def _when_imported(name: str, function: Callable[[ModuleType], None]) -> None:
    """Calls `function` with the module `name`, now or once it has been imported."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


class _AfterImport(MetaPathFinder):
    """Calls `function` with the module `name` after its import; the module is found and loaded as without this."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self._name, self._function = name, function
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            execute: Callable[[ModuleType], None] = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._function(module)

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
