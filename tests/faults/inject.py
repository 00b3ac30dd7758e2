"""Faults at a named rank, place and batch, so that a test fails where it says and not when it happens to."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch.distributed as dist

Kind = Literal["exception", "exit", "kill", "hang", "stop", "sigterm", "sigterm-launcher", "kill-launcher"]
Place = Literal["start", "callback", "training_step", "validation_step", "worker", "setup", "teardown", "save"]

MESSAGE = "injected fault"


class InjectedError(RuntimeError):
    """What the user's code raises."""


@dataclass
class Fault:
    """What happens, and where.

    Args:
        kind: `exception` and `exit` raise; `kill` is SIGKILL and `stop` SIGSTOP to the own process; `hang` never
            returns; `sigterm` goes to the own process; the last two go to the parent.
        rank: On this rank only.
        step: At this batch; None: at once.
        place: Where in the user's code.
        note: A file that gets the time at which it happened.
    """

    kind: Kind
    rank: int
    step: int | None = None
    place: Place = "callback"
    note: Path | None = None
    has_struck: bool = False
    """A step's code runs once for every microbatch."""

    def strike(self, place: Place, step: int | None, rank: int | None = None) -> None:
        """Happens, if this is its rank, place and batch."""
        rank = dist.get_rank() if rank is None else rank
        if self.has_struck or (place, rank) != (self.place, self.rank) or self.step not in (None, step):
            return
        self.has_struck = True
        if self.note is not None:
            self.note.write_text(str(time.time()))
        self._happen()

    def _happen(self) -> None:
        signals: dict[str, tuple[int, signal.Signals]] = {
            "kill": (os.getpid(), signal.SIGKILL),
            "stop": (os.getpid(), signal.SIGSTOP),
            "sigterm": (os.getpid(), signal.SIGTERM),
            "sigterm-launcher": (os.getppid(), signal.SIGTERM),
            "kill-launcher": (os.getppid(), signal.SIGKILL),
        }
        if self.kind in signals:
            os.kill(*signals[self.kind])
        elif self.kind == "hang":
            while True:
                time.sleep(1)
        elif self.kind == "exit":
            raise SystemExit(3)
        else:
            raise InjectedError(MESSAGE)


class FailAt(L.Callback):
    """A fault in a callback: at the start of training batch `step` of `rank`, or in `setup` or `teardown`.

    Args:
        rank: See `Fault`.
        step: See `Fault`.
        kind: See `Fault`.
        place: See `Fault`.
        note: See `Fault`.
    """

    def __init__(
        self, rank: int, step: int | None, kind: Kind, place: Place = "callback", note: Path | None = None
    ) -> None:
        self.fault = Fault(kind, rank, step, place, note)

    def setup(self, *_: Any, **__: Any) -> None:
        self.fault.strike("setup", self.fault.step)

    def teardown(self, *_: Any, **__: Any) -> None:
        self.fault.strike("teardown", self.fault.step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.fault.strike("callback", batch_idx)

    def on_save_checkpoint(self, *_: Any, **__: Any) -> None:
        self.fault.strike("save", self.fault.step)
