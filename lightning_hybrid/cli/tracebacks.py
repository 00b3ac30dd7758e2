"""Errors that end a command: those that refuse a run are shown as a paragraph, all others with a folded traceback."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import TracebackType

import lightning
import lightning_fabric
import pytorch_lightning

import lightning_hybrid
from lightning_hybrid._torch_private import explicitly_raised
from lightning_hybrid.cli.errors import paragraph
from lightning_hybrid.launch.tracebacks import REFUSALS, not_of_user, show_folded

_COMMAND_LINE = f"{Path(__file__).parent}/"
"""Frames outside of this folder are those of the interpreter and of the script that pip has installed."""
_LIGHTNING = tuple(
    f"{Path(module.__file__ or '').parent}/"
    for module in (lightning_hybrid, lightning, pytorch_lightning, lightning_fabric)
)
_HAS_PLACE = re.compile(r"\.py:\d+")


def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error that ends the process; for `sys.excepthook`."""
    sys.stdout.flush()
    message = refusal(error)
    if message is not None:
        sys.stderr.write(f"error: {paragraph(message)}\n")
    else:
        show_folded(kind, error, trace, _COMMAND_LINE)


def refusal(error: BaseException) -> str | None:
    """Returns the message of an error that refuses a run, with the line of the user's code; None for another error.

    A run is refused by an error of this package or of Lightning that says so by its type, or that one of them raises
    by a `raise` statement before code of the user runs.
    """
    raised_in, users_line = _places(error.__traceback__)
    if isinstance(error, REFUSALS):
        known = _HAS_PLACE.search(str(error)) or users_line is None
        return str(error) if known else f"{str(error).rstrip('.')} ({users_line})."
    by_us = raised_in is not None and raised_in.startswith(_LIGHTNING)
    if users_line is None and by_us and isinstance(error, (ValueError, TypeError, OSError, RuntimeError)):
        return str(error) if explicitly_raised(error) else None
    return None


def _places(trace: TracebackType | None) -> tuple[str | None, str | None]:
    """Returns the file of the innermost frame, and the innermost line of user code as `file.py:12`."""
    innermost, line = None, None
    while trace is not None:
        innermost = trace.tb_frame.f_code.co_filename
        if innermost.startswith(_COMMAND_LINE):
            line = None
        elif not innermost.startswith((*not_of_user(), "<")):
            line = f"{innermost}:{trace.tb_lineno}"
        trace = trace.tb_next
    return innermost, line
