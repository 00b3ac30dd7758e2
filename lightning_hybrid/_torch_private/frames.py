"""Frames of the running threads: locations in the user's code."""

from __future__ import annotations

import contextlib
import dis
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

_TORCH, _PACKAGE = Path(torch.__file__).parent, Path(__file__).parent.parent
_DEPRECATED = str(_TORCH.parent / "typing_extensions.py")
"""File whose `deprecated` wraps functions."""
_SKIPPED_FOLDERS = (
    str(_TORCH),
    str(_PACKAGE),
    *(str(_TORCH.parent / n) for n in ("lightning", "pytorch_lightning", "torchmetrics")),
    contextlib.__file__,
    _DEPRECATED,
)
_COLLECTIVE_PLACES = tuple(str(p) for p in (_TORCH / "distributed", _TORCH / "_ops.py", _TORCH / "autograd", _PACKAGE))
_COLLECTIVES = tuple(
    str(_TORCH / name)
    for name in (
        "distributed/distributed_c10d.py",
        "distributed/c10d_logger.py",
        "distributed/nn/functional.py",
        "overrides.py",
    )
) + (
    _DEPRECATED,
    warnings.__file__,
    str(Path(__file__).with_name("timing.py")),
    str(_PACKAGE / "verification" / "randomness.py"),  # its mode calls each function
)
WATCHING = str(_TORCH.parent / "wandb")
"""Folder of the logger that watches weights, each rank its own, from a hook of the module's forward."""
_WITHOUT_FILE = ("<string>", "<stdin>", "<python-input", "<ipython-input", "<console>", "<cell")
"""Beginnings of the names that Python and prompts give to code without a file."""
_EXAMPLES = (str(_PACKAGE / "models"), str(_PACKAGE / "data"))
_STANDARD_LIBRARY = str(Path(threading.__file__).parent)
_OTHERS_CODE = (*_SKIPPED_FOLDERS, _STANDARD_LIBRARY)


def user_location() -> str:
    """Returns the innermost frame outside torch, Python's library and this package, as `file.py:12 (function)`."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_of_user(frame):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "unknown location"


def user_location_in(traceback: TracebackType | None) -> str:
    """Returns the innermost frame of `traceback` in the user's code, as `user_location` does."""
    found = "unknown location"
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if _is_of_user(traceback.tb_frame):
            found = f"{code.co_filename}:{traceback.tb_lineno} ({code.co_name})"
        traceback = traceback.tb_next
    return found


def is_users_collective() -> bool:
    """Returns True if the user's code has called the collective of torch that calls the caller of this function."""
    frame = sys._getframe(2)
    while frame is not None and (
        frame.f_code.co_filename.startswith(_COLLECTIVES) or frame.f_code.co_name.endswith("__torch_function__")
    ):
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(_SKIPPED_FOLDERS)


def _is_of_user(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    installed = "-packages" in name  # inside the folder of the standard library
    skipped = name.startswith(_SKIPPED_FOLDERS) or _is_generated(frame)
    return not skipped and (installed or not name.startswith(_STANDARD_LIBRARY))


def _is_generated(frame: FrameType) -> bool:
    """Returns True for code without a file that the user has not written, such as methods of dataclasses.

    The user's own code without a file, of `python -c`, a prompt or `exec`, runs in a module without a file.
    """
    name, scope = frame.f_code.co_filename, frame.f_globals
    of_named_tuple = str(scope.get("__name__")).startswith("namedtuple_")
    return name.startswith("<") and ("__file__" in scope or of_named_tuple or not name.startswith(_WITHOUT_FILE))


def location_of(function: Any) -> str:
    """Returns where a user's function or method begins, as `file.py:12 (function)`."""
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    return "unknown location" if code is None else f"{code.co_filename}:{code.co_firstlineno} ({code.co_name})"


def read_site() -> str:
    """Returns a key of the place in the code that reads a value: equal whenever the same instruction reads.

    The place is the innermost instruction outside this package, for example in `torch.distributions`, and the line of
    the user's code that leads to it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(str(_PACKAGE)):
        frame = frame.f_back
    inner = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}:{frame.f_lasti}"
    return f"{inner} {user_location()}"


def explicitly_raised(error: BaseException) -> bool:
    """Returns True if a `raise` or `assert` statement has raised `error`, not an operation that has failed."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    return dis.opname[traceback.tb_frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"


def called_by_torch() -> bool:
    """Returns True if code of torch or of this package has called the caller of this function."""
    name = sys._getframe(2).f_code.co_filename
    return name.startswith((str(_TORCH), str(_PACKAGE))) and not name.startswith(_EXAMPLES)


def main_thread_location() -> tuple[str, bool]:
    """Returns the location of the main thread, as `file.py:12 (function)`, and whether it waits in a collective.

    The location is the innermost frame of the user's code, or the innermost frame of all if there is none.
    """
    innermost = frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if innermost is None:
        return "unknown location", False
    name = innermost.f_code.co_filename
    waiting = name.startswith(_COLLECTIVE_PLACES) and not name.startswith(_EXAMPLES)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_OTHERS_CODE) and not _is_generated(frame):
            break
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})", waiting


@contextmanager
def user_lines_seen(seen: Callable[[str], None]) -> Iterator[None]:
    """Calls `seen` before each line of user code that this thread runs, with the location as in `user_location`.

    Does nothing under a debugger or a coverage tool, which use the same hook of Python.
    """

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if name.startswith(_OTHERS_CODE) or _is_generated(frame):
            return None
        if event == "line":
            seen(f"{name}:{frame.f_lineno} ({frame.f_code.co_name})")
        return trace

    if sys.gettrace() is not None:
        yield
        return
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
