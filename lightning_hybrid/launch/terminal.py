"""What a run says in the terminal: long operations once, from one rank, and nothing that users can do nothing about."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from lightning_utilities.core import rank_zero

LEAF_SPEC = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
"""The start of a warning that Lightning 2.6 causes with torch 2.13, in every process."""
_LONG_SECONDS = 5.0
"""Time after which an operation is announced."""


@contextmanager
def said_later(text: str, after_seconds: float) -> Iterator[threading.Event]:
    """Prints `text` if the context takes longer than `after_seconds`; yields an event that is set then."""
    said = threading.Event()

    def say() -> None:
        said.set()
        print(text, file=sys.stderr, flush=True)  # noqa: T201 -- where progress bars are

    timer = threading.Timer(after_seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield said
    finally:
        timer.cancel()


@contextmanager
def told_if_long(doing: str, after_seconds: float = _LONG_SECONDS) -> Iterator[None]:
    """Prints on rank 0 that the run is `doing` something, once it takes long, and at the end how long it has taken."""
    if rank_zero.rank_zero_only.rank != 0:
        yield
        return
    begin = time.monotonic()
    with said_later(f"{doing} ...", after_seconds) as told:
        yield
        if told.is_set():
            print(f"{doing}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)  # noqa: T201


def lightning_is_quiet() -> AbstractContextManager:
    """Hides what Lightning logs on every rank: that a process group begins."""
    names = ("lightning.fabric.utilities.distributed", "lightning_fabric.utilities.distributed")
    return log_level(logging.WARNING, *map(logging.getLogger, names), rank_zero.log)


@contextmanager
def log_level(level: int, *loggers: logging.Logger) -> Iterator[None]:
    """Sets the level of loggers for the duration of the context."""
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
