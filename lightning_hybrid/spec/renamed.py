"""Old names of public arguments, accepted for one release."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)


def renamed_arguments(**names: str) -> Callable[[_Class], _Class]:
    """Makes a class accept old names of its keyword arguments, with a `DeprecationWarning`.

    Old names become keyword arguments of the constructor's signature, None by default, so that configuration files may
    hold them, too.

    Args:
        names: The new name of each old one. The new argument must be None by default.
    """

    def decorate(cls: _Class) -> _Class:
        init: Any = cls.__init__

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for old, new in names.items():
                value = kwargs.pop(old, None)
                if value is None:
                    continue
                if kwargs.get(new) is not None:
                    raise TypeError(f"`{cls.__name__}` got `{new}` and `{old}`, its old name. Give `{new}` only.")
                warnings.warn(
                    f"`{old}` of `{cls.__name__}` is now named `{new}`; the next release removes the old name.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = value
            init(self, *args, **kwargs)

        signature = inspect.signature(init)
        added = [signature.parameters[new].replace(name=old, default=None) for old, new in names.items()]
        wrapped: Any = __init__
        wrapped.__annotations__ = {
            **init.__annotations__,
            **{old: init.__annotations__[new] for old, new in names.items()},
        }
        wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])
        cls.__init__ = wrapped
        return cls

    return decorate
