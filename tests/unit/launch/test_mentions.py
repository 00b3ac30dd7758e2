"""Finds names in the user's code, in the functions that it calls, and nowhere else."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback

from lightning_hybrid.launch.mentions import mentions


class Direct(L.Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = True


def stop(trainer: Any) -> None:
    setattr(trainer, "should_stop", True)  # noqa: B010 -- what is tested


class Indirect(L.Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        def inner() -> None:
            stop(trainer)

        inner()


def test_users_code_is_searched() -> None:
    assert mentions([Direct()], "should_stop")
    assert mentions([Indirect()], "should_stop")
    assert mentions([LambdaCallback(on_train_end=lambda trainer, module: stop(trainer))], "should_stop")


def test_lightnings_own_code_is_not() -> None:
    assert not mentions([EarlyStopping("loss"), L.LightningModule(), L.Callback()], "should_stop")
