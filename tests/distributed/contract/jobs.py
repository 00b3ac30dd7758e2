"""Runs for the contract tests: each returns what a rank has seen, to be compared with one process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from torch.utils.data import DataLoader

from tests.distributed.contract import modules
from tests.distributed.jobs import Numbers, quiet

SAMPLES, BATCH = 40, 16
"""The last batch of an epoch is smaller."""


def make_trainer(layout: str | None, **options: Any) -> tuple[L.Trainer, int]:
    """A Trainer and its number of replicas.

    Args:
        layout: The layout, with a schedule after a space if wanted; None for one process.
        **options: Arguments of the Trainer.
    """
    strategy: Any = "auto"
    devices = replicas = 1
    if layout is not None:
        from lightning_hybrid import HybridStrategy, Layout

        name, _, schedule = layout.partition(" ")
        parsed, chosen = Layout.parse(name), {"schedule": schedule} if schedule else {}
        strategy, devices, replicas = HybridStrategy(layout=name, **chosen), parsed.devices, parsed.replicas  # type: ignore[arg-type]  -- options of any type
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 2,
    }
    return L.Trainer(
        **{"accelerator": "cpu", "devices": devices, "strategy": strategy, **defaults, **options}
    ), replicas


def loader(replicas: int, samples: int = SAMPLES, batch: int = BATCH) -> DataLoader:
    return DataLoader(Numbers(samples), batch_size=batch // replicas)


def start(seed: int = 7) -> None:
    quiet()
    L.seed_everything(seed, verbose=False)


def logs(layout: str | None) -> dict[str, Any]:
    """Everything that loggers, the progress bar and callbacks see of `Logs`."""
    start()
    memory, outputs, module = modules.Memory(), modules.Outputs(), modules.Logs()
    trainer, n = make_trainer(layout, logger=memory, callbacks=[outputs])
    trainer.fit(module, loader(n), [loader(n, 32), loader(n, 16)])
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {"lines": memory.lines, "outputs": outputs.train, "bars": outputs.bars, "metrics": metrics}


def metrics(layout: str | None) -> dict[str, Any]:
    """Everything that is seen of the metrics of `MetricsModule` and of a callback."""
    start()
    memory, callback, module = modules.Memory(), modules.CallbackMetric(), modules.MetricsModule()
    trainer, n = make_trainer(layout, logger=memory, callbacks=[callback])
    trainer.fit(module, loader(n), loader(n, 24))
    by_hand = [{k: v.tolist() for k, v in values.items()} for values in module.by_hand]
    return {"lines": memory.lines, "by hand": by_hand, "callback": callback.values}


def different_keys(layout: str | None) -> None:
    """Trains a module that logs a key on one replica only."""
    start()
    trainer, n = make_trainer(layout, num_sanity_val_steps=0)
    trainer.fit(modules.OnOneReplica(), loader(n), loader(n))


def reduce_by(layout: str | None) -> None:
    """Trains a module that logs with a `reduce_fx` that Lightning refuses."""
    start()
    trainer, n = make_trainer(layout)
    trainer.fit(modules.OwnReduction(), loader(n))


def two_owners(layout: str | None) -> None:
    """Trains a module that updates one metric on two stages."""
    start()
    trainer, n = make_trainer(layout)
    trainer.fit(modules.MetricOnTwoStages(), loader(n))


def loggers(layout: str | None, folder: str, watch: bool = False) -> int:
    """Trains with CSV, TensorBoard and W&B loggers that write to `folder`; the number of W&B's offline runs."""
    import wandb
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

    start()
    weights_and_biases = WandbLogger(offline=True, save_dir=folder, settings=wandb.Settings(silent=True))
    chosen = [CSVLogger(folder, "csv", "0"), TensorBoardLogger(folder, "tensorboard", "0"), weights_and_biases]
    trainer, n = make_trainer(layout, logger=chosen, callbacks=[modules.Watch(weights_and_biases)] if watch else [])
    module = modules.WithHyperparameters(width=16)
    trainer.fit(module, loader(n), loader(n, 24))
    wandb.finish()
    wandb.teardown()  # ends its service process
    return trainer.global_step
