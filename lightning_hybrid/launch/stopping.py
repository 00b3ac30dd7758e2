"""Stops all ranks together where user code sets `trainer.should_stop` on some of them.

Lightning's own callbacks agree before they set it. Code of the user does not, and a rank that leaves the training loop
alone would leave the others in a collective. If code of the module or of a callback mentions `should_stop`, the ranks
vote after every batch, before the loop reads it. Otherwise a value that appears nevertheless on some rank is hidden
from the loop until the all-reduce of the next step has carried it to all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer

from lightning_hybrid._lightning_private import before_stop_is_read, twins
from lightning_hybrid.launch.mentions import mentions


class Stopping:
    """Makes `trainer.should_stop` the same on all ranks.

    Args:
        any_rank: Returns True if its argument is True on any rank. Collective.
    """

    def __init__(self, any_rank: Callable[[bool], bool]) -> None:
        self._any_rank = any_rank
        self._trainer: pl.Trainer | None = None
        self._votes = self._trusts = self._agreed = False
        self.requested = False
        """True if this rank wants to stop and the others do not know yet."""

    def installed(self, trainer: pl.Trainer) -> AbstractContextManager:
        """Replaces what the trainer's loops read, for the duration of the context. Collective."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
        self._trainer, self._agreed, self.requested = trainer, False, False
        self._votes = self._any_rank(mentions([trainer.lightning_module, *callbacks], "should_stop"))
        self._trusts = any(isinstance(callback, twins(EarlyStopping, Timer)) for callback in callbacks)
        return before_stop_is_read(trainer, self._agree)

    def hear(self, any_rank: bool) -> None:
        """Stores the result of an all-reduce of `requested`."""
        self._agreed |= any_rank

    def _agree(self) -> None:
        trainer = self._trainer
        if trainer is None:
            return
        if self._votes:
            trainer.should_stop = self._any_rank(trainer.should_stop)
        elif not self._trusts:
            self.requested |= trainer.should_stop and not self._agreed
            trainer.should_stop = self._agreed
