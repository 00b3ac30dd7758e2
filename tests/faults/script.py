"""A user's training script with one fault in it, started by `launch.py`."""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.utils.data import DataLoader

from lightning_hybrid import HybridStrategy, Layout
from lightning_hybrid._torch_private import limit_waiting
from tests.distributed.jobs import Classifier, Numbers, quiet
from tests.faults.inject import FailAt, Fault

BATCHES = 40


class Data(Numbers):
    """Samples, one of which may bring the fault."""

    fault: Fault | None = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.fault is not None and self.fault.place == "worker":
            self.fault.strike("worker", index, rank=own_rank())
        return super().__getitem__(index)


class Module(Classifier):
    """With the fault in a step."""

    fault: Fault | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fault is not None:
            self.fault.strike("training_step", batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fault is not None and not self.trainer.sanity_checking:
            self.fault.strike("validation_step", batch_idx)
        super().validation_step(batch, batch_idx)


class Report(L.Callback):
    """What a user's callback sees of the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[str, Any] = {"batches": 0, "exception": None}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen["batches"] = trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.seen["exception"] = type(exception).__name__
        (self.folder / f"seen{own_rank()}.json").write_text(json.dumps(self.seen))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.folder / f"seen{own_rank()}.json").write_text(json.dumps(self.seen))


class Patience(L.Callback):
    """Collectives wait this long in training; the start of processes takes longer on a busy machine."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def on_train_start(self, *_: Any) -> None:
        if self.seconds is not None:
            limit_waiting(timedelta(seconds=self.seconds))


def own_rank() -> int:
    """From the environment, which workers of a data loader share."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", default="")
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--step", type=int, default=None)
    parser.add_argument("--place", default="callback")
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--patience", type=float)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--differs", default="")
    options = parser.parse_args()
    (options.out / f"pid{own_rank()}").write_text(str(os.getpid()))
    mine = own_rank() == options.rank
    if options.place == "start" and mine:
        (options.out / "struck").write_text(str(time.time()))
        if options.kind == "hang":
            time.sleep(1000)
        raise RuntimeError("injected fault before the Trainer")
    quiet()
    warnings.simplefilter("default", RuntimeWarning)
    L.seed_everything(7, verbose=False)
    module, data = Module(width=24 if options.differs == "width" and mine else 16), Data(BATCHES * 8)
    callbacks: list[L.Callback] = [Report(options.out), Patience(options.patience)]
    if options.kind:
        fault = Fault(options.kind, options.rank, options.step, options.place, options.out / "struck")
        type(module).fault = data.fault = fault  # of the class: the step changes no state of the module
        callbacks.append(FailAt(fault.rank, fault.step, fault.kind, fault.place, fault.note))
    if options.save or options.resume:
        callbacks.append(OnExceptionCheckpoint(options.out / "saved"))
    layout = Layout.parse(options.layout)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=layout.devices,
        strategy=HybridStrategy(
            layout=layout,
            schedule="GPipe" if options.differs == "schedule" and mine else "1F1B",
            timeout=timedelta(seconds=options.timeout),
        ),
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=options.save or options.resume,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    workers = 1 if options.place == "worker" else 0
    train = DataLoader(data, batch_size=8 // layout.replicas, num_workers=workers)
    val = DataLoader(Numbers(32), batch_size=4)
    path = str(options.out / "saved" / "on_exception.ckpt") if options.resume else None
    trainer.fit(module, train, val, ckpt_path=path)
    strategy: Any = trainer.strategy
    total = float(sum(p.double().sum() for p in strategy.full_state_dict().values()))
    if own_rank() == 0:
        (options.out / "end.json").write_text(json.dumps({"sum": total, "steps": trainer.global_step}))


if __name__ == "__main__":
    main()
