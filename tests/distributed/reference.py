"""Runs of one process that layouts are compared with, each made once for all tests."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

_results: dict[bytes, Any] = {}


def reference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns what `function` gives in this process for these arguments; nobody may change the result."""
    key = pickle.dumps((function, args, sorted(kwargs.items())))
    if key not in _results:
        _results[key] = function(*args, **kwargs)
    return _results[key]
