"""Stops all ranks together after a SIGTERM to any rank: each rank completes its current batch.

Lightning broadcasts inside its signal handler; the broadcast meets the collectives of a step on other ranks and hangs.
Here the handler only sets a flag. The all-reduce of a step carries the flags, so all ranks already know the result when
a training batch begins, where Lightning broadcasts rank 0's flag; the ranks run a collective there only if there was no
all-reduce since the last batch. Then all ranks raise Lightning's `SIGTERMException` at the same place, so that
callbacks may save a checkpoint together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_hybrid._lightning_private import of_package, set_received_sigterm, sigterm_routed


class Preemption:
    """Records a SIGTERM to this rank, and makes all ranks stop together.

    Args:
        any_rank: Returns True if its argument is True on any rank. Collective.
    """

    def __init__(self, any_rank: Callable[[bool], bool]) -> None:
        self._any_rank = any_rank
        self.requested = False
        """True if this rank has received a SIGTERM."""
        self._heard: bool | None = None

    def installed(self, trainer: pl.Trainer) -> AbstractContextManager:
        """Replaces Lightning's handler while the trainer runs, for the duration of the context."""
        self._heard, self.requested = None, False

        def before_batch() -> None:
            if self.agree(trainer):
                raise of_package(trainer, SIGTERMException)

        return sigterm_routed(trainer, self._note, before_batch)

    def _note(self, *_: Any) -> None:
        self.requested = True

    def hear(self, any_rank: bool) -> None:
        """Stores `any_rank`, the result of an all-reduce of the flags, so that the next `agree` needs no collective."""
        self._heard = any_rank

    def agree(self, trainer: pl.Trainer) -> bool:
        """Returns True if any rank has received a SIGTERM; Lightning's loops of all ranks then stop.

        Collective, unless `hear` was called since the last `agree`.
        """
        heard, self._heard = self._heard, None
        wanted = self._any_rank(self.requested) if heard is None else heard
        if wanted:
            set_received_sigterm(trainer)
        return wanted
