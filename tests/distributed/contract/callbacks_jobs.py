"""Runs with Lightning's callbacks; each returns what a rank's callbacks have decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch import callbacks
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tests.distributed.contract import modules
from tests.distributed.contract.jobs import loader, make_trainer, start
from tests.distributed.jobs import weights


def decisions(layout: str | None, folder: str) -> dict[str, Any]:
    """What callbacks that watch a metric decide in one run, which files are left and what the loggers get."""
    start()
    memory = modules.Memory()
    best = callbacks.ModelCheckpoint(folder, "{epoch}-{score:.3f}", monitor="score", save_top_k=2, save_last=True)
    stopping = callbacks.EarlyStopping("score", patience=2)
    timer = callbacks.Timer("00:01:00:00")
    watching = [callbacks.LearningRateMonitor(), callbacks.GradientAccumulationScheduler({1: 2}), timer]
    trainer, n = make_trainer(
        layout, logger=memory, max_epochs=6, enable_checkpointing=True, callbacks=[best, stopping, *watching]
    )
    module = modules.Scored()
    trainer.fit(module, loader(n), loader(n, 24))
    return {
        "stopped": [trainer.current_epoch, trainer.global_step, stopping.stopped_epoch],
        "best": [Path(best.best_model_path).name, float(best.best_model_score or 0)],
        "kept": sorted(Path(p).name for p in best.best_k_models),
        "last": Path(best.last_model_path).name,
        "files": sorted(p.name for p in Path(folder).glob("*.ckpt")),
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "lines": memory.lines,
        "timed": timer.time_elapsed("train") > 0,
    }


def shown(layout: str | None, bar: str) -> dict[str, Any]:
    """What the progress bar and the summary of the model show, and what the monitor of devices logs."""
    start()
    kind = {"tqdm": callbacks.TQDMProgressBar, "rich": callbacks.RichProgressBar}[bar]
    summary, memory, progress = Summary(), modules.Memory(), kind()
    chosen: list[L.Callback] = [progress, summary, callbacks.DeviceStatsMonitor(cpu_stats=True)]
    trainer, n = make_trainer(layout, logger=memory, callbacks=chosen, enable_progress_bar=True, max_epochs=1)
    trainer.fit(modules.Logs(), loader(n), [loader(n, 16), loader(n, 16)])
    bars = {k: v for k, v in progress.get_metrics(trainer, trainer.lightning_module).items() if k != "v_num"}
    stats = {k for _, line in memory.lines for k in line if k.startswith("DeviceStatsMonitor")}
    return {"bar": bars, "summary": summary.found, "stats": sorted(stats), "enabled": progress.is_enabled}


class Summary(callbacks.ModelSummary):
    """Keeps what would be printed."""

    def __init__(self) -> None:
        super().__init__(max_depth=2)
        self.found: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        made: Any = self._summary(trainer, pl_module)
        self.found = [made.total_parameters, made.trainable_parameters, [list(made.layer_names), made.param_nums]]


class Ema(callbacks.WeightAveraging):
    """An exponential moving average."""

    def __init__(self, use_buffers: bool = True) -> None:
        super().__init__(use_buffers=use_buffers, multi_avg_fn=get_ema_multi_avg_fn(0.5))


AVERAGES: dict[str, Any] = {
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2),
    "WeightAveraging": callbacks.WeightAveraging,
    "EMAWeightAveraging": lambda: callbacks.EMAWeightAveraging(decay=0.5),
    "by a function": lambda: callbacks.WeightAveraging(use_buffers=False, avg_fn=lambda a, p, n: 0.25 * a + 0.75 * p),
    "by a function of lists": Ema,
}


def averaged(layout: str | None, kind: str, folder: str, resumed: bool = False) -> dict[str, Any]:
    """Trains for four epochs with an average of weights, as one run or as two.

    Args:
        layout: The layout, or two with "then" between them.
        kind: Which average.
        folder: For the checkpoint between the runs.
        resumed: Whether to stop after three epochs and go on in a new Trainer.
    """
    path = Path(folder) / "between.ckpt"
    layouts = [None] if layout is None else layout.split(" then ")
    for last in (3, 4) if resumed else (4,):
        layout = layouts[0] if last == 3 else layouts[-1]
        start()
        module = modules.Base()
        trainer, n = make_trainer(layout, max_epochs=4, callbacks=[AVERAGES[kind](), StopAt(last, path)])
        trainer.fit(module, loader(n), loader(n, 24), ckpt_path=path if last == 4 and resumed else None)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}  # pyright: ignore[reportPossiblyUnbound]
    return {"weights": weights(trainer, module), "metrics": metrics}  # pyright: ignore[reportPossiblyUnbound]


class StopAt(L.Callback):
    """Saves and stops after some epochs, as if the process had been ended."""

    def __init__(self, epochs: int, path: Path) -> None:
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epochs < 4:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fine_tuned(layout: str | None, save: str | None = None) -> dict[str, Any]:
    """Trains the head for an epoch, then all."""
    start()
    module = modules.FineTuned()
    tuning = callbacks.BackboneFinetuning(1, backbone_initial_lr=0.05, should_align=False, lambda_func=lambda _: 1.0)
    trainer, n = make_trainer(layout, max_epochs=3, callbacks=[tuning])
    trainer.fit(module, loader(n), loader(n, 24))
    if save is not None:
        trainer.save_checkpoint(save)
    groups = [(len(g["params"]), g["lr"]) for g in trainer.optimizers[0].param_groups]
    return {"weights": weights(trainer, module), "groups": groups}


def copied(layout: str | None) -> str:
    """Calls a copy of a partitioned module; the error."""
    import copy

    start()
    trainer, n = make_trainer(layout, max_epochs=1)
    module = modules.Base()
    trainer.fit(module, loader(n))
    try:
        copy.deepcopy(module)(torch.zeros(1, 16))
    except ValueError as error:
        return str(error)
    return "no error"
