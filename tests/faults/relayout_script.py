"""A training script that changes its layout, with one fault in one phase of that, started by `launch.py`."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader

from lightning_hybrid import HybridStrategy, Layout
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.optimizer import OptimizerWrapper
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.reshard import exchange
from lightning_hybrid.spec.errors import PartitionError
from tests.distributed.jobs import Classifier, Numbers, quiet
from tests.faults.inject import Fault

STEPS, SWITCH = 12, 6
PLACES: dict[str, tuple[Any, str]] = {
    "detach": (Partition, "detach"),
    "plan": (Engine, "plan_partition"),
    "memory": (Partition, "apply"),
    "move": (exchange, "_prepare_round"),
    "follow": (OptimizerWrapper, "install"),
}
"""What runs in each phase of the protocol."""


class Change(L.Callback):
    """Changes the layout; a fault strikes in one of its phases."""

    def __init__(self, layout: str, phase: str, strike: Callable[[], None]) -> None:
        self._layout, self._phase, self._strike = layout, phase, strike
        self.refused: str | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != SWITCH:
            return
        if self._phase:
            self._prepare()
        strategy: Any = trainer.strategy
        try:
            strategy.relayout(self._layout)
        except PartitionError as error:
            self.refused = str(error)

    def _prepare(self) -> None:
        owner, name = PLACES[self._phase]
        original = getattr(owner, name)

        def struck(*args: Any, **kwargs: Any) -> Any:
            setattr(owner, name, original)
            self._strike()
            return original(*args, **kwargs)

        setattr(owner, name, struck)


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", default="dp2")
    parser.add_argument("--after", default="pp2")
    parser.add_argument("--phase", default="")
    parser.add_argument("--kind", default="")
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    own = int(os.environ.get("LOCAL_RANK", "0"))
    (options.out / f"pid{own}").write_text(str(os.getpid()))
    quiet()
    warnings.simplefilter("default", RuntimeWarning)
    L.seed_everything(7, verbose=False)
    fault = Fault(options.kind, options.rank, note=options.out / "struck") if options.kind != "memory" else None

    def strike() -> None:
        if fault is not None:
            fault.strike("callback", None)
        elif dist.get_rank() == options.rank:
            (options.out / "struck").write_text("0")
            raise torch.OutOfMemoryError("injected")

    change = Change(options.after, options.phase, strike)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=HybridStrategy(layout=options.before, timeout=timedelta(seconds=30)),
        max_steps=STEPS,
        callbacks=[
            ModelCheckpoint(options.out / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1),
            OnExceptionCheckpoint(options.out / "saved"),
            change,
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(Numbers(8 * STEPS), batch_size=8 // Layout.parse(options.before).replicas)
    path = "last" if options.resume else None
    trainer.fit(Classifier(optimizer="adamw"), data, ckpt_path=path)
    strategy: Any = trainer.strategy
    found = {k: v.double().sum().item() for k, v in strategy.full_state_dict().items()}
    if own == 0:
        end = {"sums": found, "steps": trainer.global_step, "refused": change.refused, "layout": str(strategy.layout)}
        (options.out / "end.json").write_text(json.dumps(end))


if __name__ == "__main__":
    main()
