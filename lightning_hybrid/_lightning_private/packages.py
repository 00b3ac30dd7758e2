"""The two names of Lightning: `lightning.pytorch` and `pytorch_lightning` hold the same code, but different classes.

This package imports `lightning.pytorch`. A user may import either: `twins` has the classes of both for `isinstance`,
`of_package` the class or function of the package that the user's object belongs to, and classes derived from
`EitherPackage` make objects for Trainers of both. `pytorch_lightning` is never imported here, only by the user.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lightning.pytorch.callbacks import Callback as _Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.utilities import model_helpers
from typing_extensions import Self

T = TypeVar("T")

_OTHER = "pytorch_lightning"
_NAMES = {"lightning.pytorch": _OTHER, "lightning.fabric": "lightning_fabric"}
"""Prefixes of the names of modules, and those of the same modules under the other name."""


def _twin(thing: Any) -> Any:
    """Returns the class or function of the other name; None if its module is not imported."""
    for prefix, other in _NAMES.items():
        if thing.__module__.startswith(prefix):
            module = sys.modules.get(other + thing.__module__.removeprefix(prefix))
            return None if module is None else attrgetter(thing.__qualname__)(module)
    raise ValueError(f"{thing} is not a part of Lightning.")


def twins(*things: T) -> tuple[T, ...]:
    """Returns classes of `lightning`, and those of `pytorch_lightning` if that is imported."""
    return (*things, *(twin for thing in things if (twin := _twin(thing)) is not None))


def of_package(owner: Any, thing: T) -> T:
    """Returns `thing`, a class or function of `lightning`, from the package that `owner` belongs to."""
    return _twin(thing) if _belongs_to_other(type(owner)) else thing


@cache
def _belongs_to_other(kind: type) -> bool:
    """Returns True if the first class of Lightning that `kind` derives from is one of `pytorch_lightning`."""
    for base in kind.__mro__:
        package = next((n for n in (*_NAMES, *_NAMES.values()) if f"{base.__module__}.".startswith(f"{n}.")), None)
        if package is not None:
            return package in _NAMES.values()
    return False


def is_overridden(method: str, owner: Any) -> bool:
    """Returns True if a LightningModule, DataModule or callback has its own `method`."""
    return of_package(owner, model_helpers.is_overridden)(method, owner)


class EitherPackage:
    """Base of classes whose objects belong to the package of the Trainer that takes them.

    The class of an object derives from the class as it is written and from Lightning's base class of both packages,
    that of the Trainer's package first. Until a Trainer is known this is `lightning`.
    """

    base: ClassVar[type]
    """Lightning's base class, in `lightning`."""
    as_written: ClassVar[type]
    """The class without a base class of Lightning."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.as_written = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return object.__new__(_derived(cls.as_written, twins(cls.base)))

    def belong_to(self, part: Any) -> None:
        """Gives the object the base class of the package of `part`, an object of the Trainer."""
        first, *others = twins(self.base)
        if _belongs_to_other(type(part)):
            first, others = others[0], [first]
        self.__class__ = _derived(self.as_written, (first, *others))


@cache
def _derived(kind: Any, bases: tuple[type, ...]) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    derived: Any = types.new_class(kind.__name__, (kind, *bases), exec_body=lambda body: body.update(names))
    derived.as_written = kind
    return derived


if TYPE_CHECKING:
    StrategyOfEither = ParallelStrategy
    PrecisionOfEither = MixedPrecision
else:

    class StrategyOfEither(EitherPackage):
        """Base of strategies: Lightning's `ParallelStrategy`. A Trainer sets the accelerator first."""

        base = ParallelStrategy

        @property
        def accelerator(self) -> Any:
            """The accelerator of the Trainer."""
            return self._accelerator

        @accelerator.setter
        def accelerator(self, accelerator: Any) -> None:
            self._accelerator = accelerator
            if accelerator is not None:
                self.belong_to(accelerator)

    class PrecisionOfEither(EitherPackage):
        """Base of precision plugins: Lightning's `MixedPrecision`."""

        base = MixedPrecision


class Callback(_Callback):
    """Base of callbacks. `pytorch_lightning`'s `Callback` becomes a base, too, when it is imported: both are empty."""


def register_strategy(name: str, strategy: Any, description: str) -> None:
    """Makes a strategy class known to the Trainers of both packages, with the launcher and the callbacks.

    Args:
        name: The name for `Trainer(strategy=name)`.
        strategy: A class derived from `StrategyOfEither`.
        description: A description for the registry.
    """
    Strategy.register(strategy)
    StrategyRegistry.register(name, strategy, description=description)

    def register_with_other() -> None:
        _twin(Strategy).register(strategy)
        _twin(ParallelStrategy).register(strategy)
        _twin(_SubprocessScriptLauncher).register(_SubprocessScriptLauncher)
        registry = sys.modules[f"{_OTHER}.strategies"].StrategyRegistry
        registry.register(name, strategy, description=description)
        Callback.__bases__ = twins(_Callback)

    _after_import(_OTHER, register_with_other)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function once, after the module with a name has been imported."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self._name, self._function = name, function

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: types.ModuleType) -> None:
            execute(module)
            self._function()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign] -- this loader loads this module only
        return spec


def _after_import(name: str, function: Callable[[], None]) -> None:
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))
