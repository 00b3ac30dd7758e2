"""Progress bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch.callbacks.progress import tqdm_progress
from pytorch_lightning.callbacks.progress import tqdm_progress as other_tqdm_progress
from typing_extensions import override

from lightning_hybrid._lightning_private.processes import is_interactive
from lightning_hybrid.patching import patched

_SECONDS = 30.0
"""Time between two lines of a bar."""
_FORMAT = "{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class _Lines(tqdm_progress.Tqdm):
    """Writes a line at the end of an epoch or a loop, and one from time to time before."""

    _said_at = 0.0
    _said: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._said_at = time.monotonic()
        super().__init__(*args, **kwargs | {"bar_format": _FORMAT})

    @override
    def refresh(self, *_: Any, **__: Any) -> None:
        if not self.disable and not self.postfix:  # otherwise `set_postfix` follows
            self._say_from_time_to_time()

    @override
    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        super().set_postfix(*args, **kwargs | {"refresh": False})
        self._say_from_time_to_time()

    @override
    def reset(self, total: float | None = None) -> None:
        self._say_end()
        super().reset(total)

    @override
    def close(self) -> None:
        if not self.disable:
            self._say_end()
            self.disable = True
            self._decr_instances(self)

    def __del__(self) -> None:
        self.leave = False  # after an error, whose message is the last line
        self.close()

    @override
    def clear(self, *_: Any, **__: Any) -> None:
        """Does nothing: a line stays."""

    def _say_from_time_to_time(self) -> None:
        if not self.disable and self.n and time.monotonic() - self._said_at >= _SECONDS:
            self._say()

    def _say_end(self) -> None:
        """Writes the last state of a bar that a terminal would keep."""
        if not self.disable and self.leave and self.n and self._said != (self.n, self.postfix):
            self._say()

    def _say(self) -> None:
        self._said_at, self._said = time.monotonic(), (self.n, self.postfix)
        self.fp.write(f"{self}\n")
        self.fp.flush()


@contextmanager
def bars_in_files() -> Iterator[None]:
    """Makes bars of `TQDMProgressBar` write few lines, where they are written to a file and not to a terminal."""
    with ExitStack() as stack:
        if not (sys.stdout.isatty() or is_interactive()):
            stack.enter_context(patched(tqdm_progress, Tqdm=_Lines))
            stack.enter_context(patched(other_tqdm_progress, Tqdm=_Lines))
        yield
