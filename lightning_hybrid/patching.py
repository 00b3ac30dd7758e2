"""Replaces attributes of objects of other packages temporarily."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def patched(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replaces attributes in the instance dictionary of `owner`, and restores the dictionary afterwards."""
    before = {name: owner.__dict__.get(name, _MISSING) for name in attributes}
    owner.__dict__.update(attributes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value


class Patches:
    """Replaces and restores attributes of several objects together, as often as needed."""

    def __init__(self) -> None:
        self._wanted: list[tuple[Any, dict[str, Any]]] = []
        self._applied = ExitStack()
        self.are_applied = False
        """True while the objects have the replaced attributes."""

    def add(self, owner: Any, **attributes: Any) -> None:
        """Replaces attributes of `owner`: immediately if other patches are applied, otherwise together with those."""
        self._wanted.append((owner, attributes))
        if self.are_applied:
            self._applied.enter_context(patched(owner, **attributes))

    def apply(self) -> None:
        """Replaces all attributes; does nothing if the attributes are replaced already."""
        if not self.are_applied:
            self.are_applied = True
            for owner, attributes in self._wanted:
                self._applied.enter_context(patched(owner, **attributes))

    def restore(self) -> None:
        """Restores all attributes; does nothing if the attributes are not replaced."""
        self.are_applied = False
        self._applied.close()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores all attributes for the duration of the context."""
        applied = self.are_applied
        self.restore()
        try:
            yield
        finally:
            if applied:
                self.apply()


@contextmanager
def ignored_warning(message: str = "", module: str = "") -> Iterator[None]:
    """Ignores warnings whose text and module match the patterns; afterwards removes this one filter."""
    warnings.filterwarnings("ignore", message=message, module=module)
    added = warnings.filters[0]
    try:
        yield
    finally:
        if added in warnings.filters:
            warnings.filters.remove(added)  # type: ignore[attr-defined] -- a list, typed as a sequence
