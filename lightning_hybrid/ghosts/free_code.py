"""Names the tensors that the user's code computes outside units, such as `rest = rest - out` between two blocks.

Every stage runs the same code from the first line on, so a call of a torch function has a name that all stages and the
dry run share: the interval it is in (see `trace`), the function, and the number of earlier calls of the function in the
interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.overrides import TorchFunctionMode

from lightning_hybrid._torch_private import function_mode_left


class FreeCall(NamedTuple):
    """The name of a call of a torch function outside units."""

    interval: int
    function: str
    number: int
    """Number of earlier calls of the function in the interval."""


class WrittenByUnits(BaseException):
    """Restarts the dry run: a tensor that the step creates is written by units, and becomes a ghost."""

    def __init__(self, call: FreeCall) -> None:
        super().__init__()
        self.call = call


class FreeCalls(TorchFunctionMode):
    """Names the calls of torch functions by the code that runs in the context.

    Args:
        interval: Returns the current interval.
        made: Called with the name of each call, its arguments, and its result; returns the result for the caller.
    """

    def __init__(self, interval: Callable[[], int], made: Callable[[FreeCall, tuple, Any], Any]) -> None:
        super().__init__()
        self._interval, self._made, self._paused = interval, made, 0
        self.counts: Counter[tuple[int, str]] = Counter()
        """Number of calls so far, by interval and function."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count calls for the duration of the context, in which a unit or code of this package runs."""
        self._paused += 1
        try:
            with function_mode_left(self):
                yield
        finally:
            self._paused -= 1

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        place = self._interval(), _name(func)
        call = FreeCall(*place, self.counts[place])
        self.counts[place] += 1
        return self._made(call, (*args, *(kwargs or {}).values()), out)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return f"{func.__self__.__name__}.{name}" if name in ("__get__", "__set__") else name
