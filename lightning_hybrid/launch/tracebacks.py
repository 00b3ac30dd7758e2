"""Shows errors with one line for successive frames of Lightning, torch and this package."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_hybrid._lightning_private import twins
from lightning_hybrid._torch_private import explicitly_raised
from lightning_hybrid.spec.errors import CheckpointError, NonFiniteError, PartitionError, RankError

REFUSALS = (PartitionError, CheckpointError, NonFiniteError, RankError, *twins(MisconfigurationException))
"""Errors that say by their type that they refuse a run."""
_HERE = f"{Path(__file__).parents[1]}/"
_FOLDED = ("lightning_hybrid", "lightning", "pytorch_lightning", "lightning_fabric", "torch", "jsonargparse")


def folded_folders() -> tuple[str, ...]:
    """Returns the folders of the packages whose frames are folded."""
    modules = [sys.modules[name] for name in _FOLDED if name in sys.modules]
    return tuple(f"{Path(module.__file__ or '').parent}/" for module in modules)


def not_of_user() -> tuple[str, ...]:
    """Returns the beginnings of the names of files that the user has not written."""
    return (*folded_folders(), f"{sysconfig.get_path('stdlib')}/", f"{sysconfig.get_path('purelib')}/", "<frozen ")


def show_folded(kind: type[BaseException], error: BaseException, trace: TracebackType | None, begin: str = "") -> None:
    """Prints an error as `sys.__excepthook__` does, with folded frames; in full if it is an error of this package.

    Args:
        kind: The class of the error.
        error: The error.
        trace: Its traceback.
        begin: A folder: frames before the first one of a file in it are left out.
    """
    refused = isinstance(error, REFUSALS) or explicitly_raised(error)
    if (
        (not refused and _is_ours(trace)) or getattr(error, "exceptions", None) or not isinstance(error, Exception)
    ):  # groups; an interrupt
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stdout.flush()
        sys.stderr.writelines(folded(traceback.TracebackException(kind, error, trace), begin))


def folded(error: traceback.TracebackException, begin: str = "") -> Iterator[str]:
    """Yields the lines of a traceback.

    Args:
        error: The traceback.
        begin: A folder: frames before the first one of a file in it are left out.
    """
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None:
        yield from folded(earlier, begin)
        cause = "The error above is the cause of this one" if error.__cause__ else "This error followed the one above"
        yield f"\n{cause}:\n\n"
    yield "Traceback (most recent call last):\n"
    folders = folded_folders()
    first = next((i for i, frame in enumerate(error.stack) if begin and frame.filename.startswith(begin)), 0)
    frames = error.stack[first:]
    if frames and not frames[-1].filename.startswith(_HERE):  # the line of a refusal is its message
        frames, last = frames[:-1], frames[-1:]
    else:
        last = []
    for hidden, group in groupby(frames, lambda frame: frame.filename.startswith(folders)):
        listed = list(group)
        if hidden:
            yield f"  ... {len(listed)} frames of Lightning and torch\n"
        else:
            yield from traceback.StackSummary.from_list(listed).format()
    yield from traceback.StackSummary.from_list(last).format()
    yield from error.format_exception_only()


def _is_ours(trace: TracebackType | None) -> bool:
    """Returns True for an error of this package's code, which has not called code of the user before."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    if not files or not files[-1].startswith(_HERE):
        return False
    of_user = [i for i, file in enumerate(files) if not file.startswith(not_of_user())]
    return not of_user or not any(file.startswith(_HERE) for file in files[: of_user[-1]])
