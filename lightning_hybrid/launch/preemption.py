"""SIGTERM to any rank: all ranks end the batch that they are at, and stop together.

Lightning's handler broadcasts inside of the signal's handler, which meets the collectives of a step on other ranks and
hangs. Here the handler only takes a note. The notes travel with the all-reduce of a step. So all ranks know already
when a training batch begins, where Lightning broadcasts rank 0's note; only if there was no all-reduce since the last
batch do they ask each other. Then all of them raise Lightning's `SIGTERMException` at the same place, so that callbacks
may save a checkpoint together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_hybrid._lightning_private import set_received_sigterm, sigterm_routed


class Preemption:
    """One rank's note of a SIGTERM.

    Args:
        any_rank: Whether its argument is true on any rank; collective.
    """

    def __init__(self, any_rank: Callable[[bool], bool]) -> None:
        self._any_rank = any_rank
        self.requested = False
        """Whether this rank was asked to stop."""
        self._heard: bool | None = None

    def installed(self, trainer: pl.Trainer) -> AbstractContextManager:
        """Takes the place of Lightning's handler while the trainer runs."""
        self._heard, self.requested = None, False

        def before_batch() -> None:
            if self.agree(trainer):
                raise SIGTERMException

        return sigterm_routed(trainer, self._note, before_batch)

    def _note(self, *_: Any) -> None:
        self.requested = True

    def hear(self, any_rank: bool) -> None:
        """Takes what all ranks have just told each other; saves the next question."""
        self._heard = any_rank

    def agree(self, trainer: pl.Trainer) -> bool:
        """Returns whether any rank was asked to stop, and has Lightning's loops of all ranks stop then.

        Collective, unless the ranks have told each other since the last time.
        """
        heard, self._heard = self._heard, None
        wanted = self._any_rank(self.requested) if heard is None else heard
        if wanted:
            set_received_sigterm(trainer)
        return wanted
