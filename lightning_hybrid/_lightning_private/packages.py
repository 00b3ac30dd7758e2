"""The two names of Lightning: `lightning.pytorch` and `pytorch_lightning` hold the same code, but different classes.

Installing `lightning` installs both. The other files of this package import `lightning.pytorch`; a user may import
either. `twins` has the classes of both for `isinstance`, `of_package` the class or function of the package that the
user's object belongs to, and classes derived from `EitherPackage` make objects for Trainers of both.
"""

from __future__ import annotations

import importlib
import types
from functools import cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lightning.pytorch.callbacks import Callback as _Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.utilities import model_helpers
from pytorch_lightning.callbacks import Callback as _OtherCallback
from typing_extensions import Self

T = TypeVar("T")

_NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
"""Prefixes of the names of modules, and those of the same modules under the other name."""


def _twin(thing: Any) -> Any:
    """Returns the class or function of `pytorch_lightning` for one of `lightning`."""
    prefix = next(prefix for prefix in _NAMES if thing.__module__.startswith(prefix))
    module = importlib.import_module(_NAMES[prefix] + thing.__module__.removeprefix(prefix))
    return attrgetter(thing.__qualname__)(module)


def twins(*things: T) -> tuple[T, ...]:
    """Returns classes or functions of `lightning`, followed by those of `pytorch_lightning`."""
    return (*things, *map(_twin, things))


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
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.as_written = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        part = object.__new__(_derived(cls.as_written, twins(cls.base)))
        part._arguments = args, kwargs
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is an unused object of the same arguments: modules keep strategies among their hyperparameters."""
        args, kwargs = self._arguments
        return partial(self.as_written, *args, **kwargs), ()

    def belong_to(self, part: Any) -> None:
        """Gives the object the base class of the package of `part`, an object of the Trainer."""
        own, other = twins(self.base)
        bases = (other, own) if _belongs_to_other(type(part)) else (own, other)
        self.__class__ = _derived(self.as_written, bases)


@cache
def _derived(kind: Any, bases: tuple[type, ...]) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    derived: Any = types.new_class(kind.__name__, (kind, *bases), exec_body=lambda body: body.update(names))
    derived.as_written = kind
    return derived


if TYPE_CHECKING:
    from pytorch_lightning.plugins.precision import MixedPrecision as _OtherMixedPrecision
    from pytorch_lightning.strategies.parallel import ParallelStrategy as _OtherParallelStrategy

    class StrategyOfEither(ParallelStrategy, _OtherParallelStrategy): ...

    class PrecisionOfEither(MixedPrecision, _OtherMixedPrecision): ...
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


class Callback(_Callback, _OtherCallback):
    """Base of callbacks for Trainers of both packages. The methods of the two base classes do nothing."""


def accept_strategy(strategy: Any) -> None:
    """Makes the Trainers of both packages accept a strategy class derived from `StrategyOfEither`, and its launcher."""
    for kind in (*twins(Strategy), *twins(ParallelStrategy)):
        kind.register(strategy)
    _twin(_SubprocessScriptLauncher).register(_SubprocessScriptLauncher)
