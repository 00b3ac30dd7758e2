"""What a hook of the user sees in place of this rank's part, apart from the steps that run within the hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


class HookView:
    """A context that a hook runs in, and that is left while a step runs within the hook, as in `optimizer_step`.

    Args:
        make: Returns the context.
        ended: Returns True if the context is not to be entered again, since the layout is another one.
    """

    def __init__(self, make: Callable[[], AbstractContextManager], ended: Callable[[], bool]) -> None:
        self._make, self._ended = make, ended
        self._entered = ExitStack()
        self.error_of_step: BaseException | None = None
        """What a step within the hook has raised."""

    def __enter__(self) -> None:
        self._entered.enter_context(self._make())

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.__exit__(*error)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Leaves the context, and enters it again afterwards."""
        self._entered.close()
        try:
            yield
        except BaseException as error:
            self.error_of_step = error
            raise
        finally:
            if not self._ended():
                self._entered.enter_context(self._make())
