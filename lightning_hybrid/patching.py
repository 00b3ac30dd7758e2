"""Attributes of other people's objects, replaced for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def patched(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replaces attributes in the instance dictionary of `owner`; afterwards the dictionary is as it was before."""
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


@contextmanager
def ignored_warning(message: str) -> Iterator[None]:
    """Ignores warnings whose text matches the pattern `message`; afterwards removes this one filter."""
    warnings.filterwarnings("ignore", message=message)
    added = warnings.filters[0]
    try:
        yield
    finally:
        if added in warnings.filters:
            warnings.filters.remove(added)  # type: ignore[attr-defined] -- a list, typed as a sequence
