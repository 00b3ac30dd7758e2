"""Errors that end a command: those that refuse a run are shown as a paragraph, all others with a folded traceback."""

from __future__ import annotations

import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import TracebackType

import jsonargparse
import lightning
import lightning_fabric
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_hybrid
from lightning_hybrid._lightning_private import twins
from lightning_hybrid._torch_private import explicitly_raised
from lightning_hybrid.cli.errors import paragraph
from lightning_hybrid.spec.errors import CheckpointError, NonFiniteError, PartitionError, RankError

_COMMAND_LINE = f"{Path(__file__).parent}/"
"""Frames outside of this folder are those of the interpreter and of the script that pip has installed."""
_LIGHTNING = tuple(
    f"{Path(module.__file__ or '').parent}/"
    for module in (lightning_hybrid, lightning, pytorch_lightning, lightning_fabric)
)
_FOLDED = (*_LIGHTNING, *(f"{Path(module.__file__ or '').parent}/" for module in (torch, jsonargparse)))
_NOT_USERS = (*_FOLDED, f"{sysconfig.get_path('stdlib')}/", f"{sysconfig.get_path('purelib')}/", "<")
_REFUSALS = (PartitionError, CheckpointError, NonFiniteError, RankError)
_HAS_PLACE = re.compile(r"\.py:\d+")


def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error that ends the process; for `sys.excepthook`."""
    sys.stdout.flush()
    message = refusal(error)
    if message is not None:
        sys.stderr.write(f"error: {paragraph(message)}\n")
    elif getattr(error, "exceptions", None) or not isinstance(error, Exception):  # groups; an interrupt
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stderr.writelines(folded(traceback.TracebackException(kind, error, trace)))


def refusal(error: BaseException) -> str | None:
    """Returns the message of an error that refuses a run, with the line of the user's code; None for another error.

    A run is refused by an error of this package or of Lightning that says so by its type, or that one of them raises
    by a `raise` statement before code of the user runs.
    """
    raised_in, users_line = _places(error.__traceback__)
    if isinstance(error, (*_REFUSALS, *twins(MisconfigurationException))):
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
        elif not innermost.startswith(_NOT_USERS):
            line = f"{innermost}:{trace.tb_lineno}"
        trace = trace.tb_next
    return innermost, line


def folded(error: traceback.TracebackException) -> Iterator[str]:
    """Yields the lines of a traceback, with one line for successive frames of Lightning, torch and this package."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None:
        yield from folded(earlier)
        cause = "The error above is the cause of this one" if error.__cause__ else "This error followed the one above"
        yield f"\n{cause}:\n\n"
    yield "Traceback (most recent call last):\n"
    first = next((i for i, frame in enumerate(error.stack) if frame.filename.startswith(_COMMAND_LINE)), 0)
    for hidden, frames in groupby(error.stack[first:-1], lambda frame: frame.filename.startswith(_FOLDED)):
        listed = list(frames)
        if hidden:
            yield f"  ... {len(listed)} frames of Lightning and torch\n"
        else:
            yield from traceback.StackSummary.from_list(listed).format()
    yield from traceback.StackSummary.from_list(error.stack[-1:]).format()
    yield from error.format_exception_only()
