"""Modules and callbacks that log what they compute from the samples of an epoch; the calls run on every rank."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- its usual name
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MeanSquaredError

from tests.distributed.jobs import Classifier, Numbers, quiet, verified_trainer_for


class Kept(Classifier):
    """Keeps the predictions of all samples, in Lightning's idiom."""

    metrics: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["x"]), batch["y"])

    def validation_step(self, batch, batch_idx):
        self.rows.append((self(batch["x"]), batch["y"]))
        return self.rows[-1]

    def on_validation_epoch_end(self):
        out, y = (torch.cat(rows) for rows in zip(*self.rows, strict=True))
        self.rows.clear()
        self.score(out, y)

    def score(self, out: Tensor, y: Tensor) -> None:
        self.log("score", (out.argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sums(Kept):
    """Sums and extremes, logged as such."""

    def score(self, out, y):
        self.log("sum", (out.argmax(1) == y).sum().float(), reduce_fx="sum")
        self.log("worst", F.cross_entropy(out, y, reduction="none").max(), reduce_fx="max")


class Meter(Kept):
    """A sum and a number of samples in an object, and a metric outside of the module tree."""

    def on_validation_epoch_start(self):
        self.total, self.metrics = {"sum": 0.0, "count": 0}, {"error": MeanSquaredError()}

    def validation_step(self, batch, batch_idx):
        out = self(batch["x"])
        self.total["sum"] += float(F.cross_entropy(out, batch["y"])) * len(out)
        self.total["count"] += len(out)
        self.metrics["error"].update(out[:, 0], batch["y"].float())

    def on_validation_epoch_end(self):
        self.log("mean", self.total["sum"] / self.total["count"])
        self.log("error", self.metrics["error"].compute())


class Averaged(Kept):
    """A `MeanMetric` of the losses of batches, as in templates."""

    def __init__(self) -> None:
        super().__init__()
        self.val_loss = MeanMetric()

    def validation_step(self, batch, batch_idx):
        self.val_loss(F.cross_entropy(self(batch["x"]), batch["y"]))
        self.log("val", self.val_loss, on_epoch=True)

    def on_validation_epoch_end(self):
        return


class Gathers(Kept):
    """Values of a step from the samples of all replicas, and a metric computed in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()

    def validation_step(self, batch, batch_idx):
        out = self(batch["x"])
        every: Any = self.all_gather(out[:, 0])
        self.error.update(out[:, 0], batch["y"].float())
        self.log("spread", every.var())
        self.log("error", self.error.compute().sqrt())

    def on_validation_epoch_end(self):
        self.error.reset()


class Losses(Kept):
    """The mean of the losses of batches: exact for batches of equal sizes only."""

    def score(self, out, y):
        parts = zip(out.split(8), y.split(8), strict=True)
        self.log("score", torch.stack([F.cross_entropy(a, b) for a, b in parts]).mean())


class Macro(Kept):
    """The mean of the accuracies of classes."""

    def score(self, out, y):
        right = (out.argmax(1) == y).float()
        self.log("score", torch.stack([right[y == k].sum() / (y == k).sum().clamp(min=1) for k in range(4)]).mean())


class Deviation(Kept):
    """A standard deviation, with a line that prints it."""

    def score(self, out, y):
        value = F.cross_entropy(out, y, reduction="none").std()
        print(f"deviation {float(value):.3f}")  # noqa: T201 -- as users do
        self.log("score", value)


class Perplexity(Kept):
    """Logged in the step."""

    def validation_step(self, batch, batch_idx):
        self.log("score", F.cross_entropy(self(batch["x"]), batch["y"]).exp(), sync_dist=True)

    def on_validation_epoch_end(self):
        return


class ConstantSize(Perplexity):
    """A mean over samples, weighted as if all batches had the same size."""

    def validation_step(self, batch, batch_idx):
        self.log("score", F.cross_entropy(self(batch["x"]), batch["y"]), batch_size=1)


class AfterBatch(Perplexity):
    """Logged in a hook from what the step returns."""

    def validation_step(self, batch, batch_idx):
        return {"losses": F.cross_entropy(self(batch["x"]), batch["y"], reduction="none")}

    def on_validation_batch_end(self, outputs: Any, batch, batch_idx, dataloader_idx=0):
        losses: Any = outputs["losses"]
        self.log("mean", losses.mean())
        self.log("score", losses.max())


class Spread(L.Callback):
    """A callback that keeps outputs."""

    def on_validation_epoch_start(self, trainer, pl_module):
        self.outs: list[Tensor] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs: Any, batch, batch_idx, dataloader_idx=0):
        self.outs.append(outputs[0])

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("mean", torch.cat(self.outs).mean())
        pl_module.log("score", torch.cat(self.outs).std())


class OfCallback(Kept):
    def on_validation_epoch_end(self):
        self.rows.clear()

    def configure_callbacks(self):
        return [Spread()]


class OfTraining(Kept):
    """Losses of training steps, at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        self.log("mean", torch.stack(self.losses).mean())
        self.log("score", torch.stack(self.losses).std())
        self.losses.clear()

    def on_validation_epoch_end(self):
        self.rows.clear()


EXACT: dict[str, type[Kept]] = {k.__name__: k for k in (Kept, Sums, Meter, Averaged)}
EVEN: dict[str, type[Kept]] = {k.__name__: k for k in (Losses, ConstantSize, Gathers)}
WARNED: dict[str, type[Kept]] = {
    k.__name__: k for k in (Macro, Deviation, Perplexity, AfterBatch, OfCallback, OfTraining)
}
MODULES = EXACT | EVEN | WARNED


def fit(layout: str | None, kind: str, samples: int, *, verify: str = "start", sanity: int = 0) -> dict[str, Any]:
    """Trains and validates; logged values, and warnings about the division of samples."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = MODULES[kind]()
    options: dict[str, Any] = {} if layout is None else {"strategy_options": {"verify": verify}}
    trainer, replicas = verified_trainer_for(layout, max_epochs=2, **options)
    trainer.num_sanity_val_steps = sanity
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        size = 16 // replicas
        trainer.fit(module, DataLoader(Numbers(), batch_size=size), DataLoader(Numbers(samples), batch_size=size))
    return {
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "warnings": [str(w.message) for w in found if "depend on how samples are divided" in str(w.message)],
        "kept": len(module.rows),
    }
