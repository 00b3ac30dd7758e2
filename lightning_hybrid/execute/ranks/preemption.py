"""SIGTERM to any rank: all ranks end the batch that they are at, and stop together.

Lightning's handler broadcasts inside of the signal's handler, which meets the collectives of a step on other ranks and
hangs. Here the handler only takes a note. Before every training batch, where Lightning broadcasts rank 0's note, the
ranks ask each other instead; then all of them raise Lightning's `SIGTERMException` at the same place, so that callbacks
may save a checkpoint together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_hybrid._lightning_private import route_sigterm, set_received_sigterm


class Preemption:
    """One rank's note of a SIGTERM.

    Args:
        any_rank: Whether its argument is true on any rank; collective.
    """

    def __init__(self, any_rank: Callable[[bool], bool]) -> None:
        self._any_rank = any_rank
        self._requested = False

    def install(self, trainer: pl.Trainer) -> None:
        """Takes the place of Lightning's handler in the trainer's next run."""

        def before_batch() -> None:
            if self.agree(trainer):
                raise SIGTERMException

        route_sigterm(trainer, self._note, before_batch)

    def _note(self, *_: Any) -> None:
        self._requested = True

    def agree(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was asked to stop; Lightning's loops of all ranks are told. Collective."""
        if self._any_rank(self._requested):
            set_received_sigterm(trainer)
            return True
        return False
