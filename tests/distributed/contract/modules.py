"""LightningModules and callbacks that use what Lightning offers around a step; for the contract tests."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
import torchmetrics
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric, MaxMetric, MeanMetric, MinMetric, SumMetric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision

from tests.distributed.jobs import WIDTH, Block


class Memory(Logger):
    """Keeps what every rank's Trainer gives its loggers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []
        self.hyperparameters: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, {k: float(v) for k, v in metrics.items()}))

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.hyperparameters.update(params)


class Telling(nn.Linear):
    """A layer that logs by itself, as a layer on the first stage."""

    owner: list[Any]

    def forward(self, input: Tensor) -> Tensor:
        module = self.owner[0]
        if module.trainer.training:
            module.trainer.lightning_module.log("stem", input.mean(), on_step=True, on_epoch=True)
        return super().forward(input)


class Base(L.LightningModule):
    """Residual blocks between two linears."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.stem: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", nn.functional.cross_entropy(self(batch["x"]), batch["y"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Logs(Base):
    """Every way to call `self.log`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Telling(WIDTH, WIDTH)
        self.stem.owner = [self]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch["x"])
        losses = nn.functional.cross_entropy(logits, batch["y"], reduction="none")
        loss, size = losses.mean(), len(losses)
        self.log("default", loss)
        self.log("epoch only", loss, on_step=False, on_epoch=True)
        self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("synced", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("unsynced", loss, on_step=True, on_epoch=True, sync_dist=False)
        self.log("bar only", loss, prog_bar=True, logger=False)
        self.log("one element", loss.reshape(1))
        self.log("number", 3.5 + batch_idx, on_epoch=True)
        self.log("weighted", losses[:1].mean() * 0 + 2.0, batch_size=3 * size, on_epoch=True)
        self.log_dict({"first": losses.sum() / size, "second": (logits**2).mean()}, on_epoch=True)
        for reduce_fx in ("sum", "max", "min", torch.max, sum):
            reduced = losses.sum() if reduce_fx in ("sum", sum) else losses.max() if "m" in str(reduce_fx) else loss
            reduced = losses.min() if reduce_fx == "min" else reduced
            name = reduce_fx if isinstance(reduce_fx, str) else f"function {reduce_fx.__name__}"
            self.log(name, reduced, reduce_fx=reduce_fx, on_step=True, on_epoch=True)
        if batch_idx % 2:
            self.log("sometimes", loss, on_epoch=True)
        for i in range(2):
            self.log("twice", loss * (1 + i), on_epoch=True)
        self.log("rank zero", 1.0 + batch_idx, rank_zero_only=True)
        return {"loss": loss, "index": batch["index"], "confidence": logits.softmax(1).amax(1).mean(), "note": "same"}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("before step", float(self.trainer.global_step))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log_dict({"end of batch": outputs["confidence"], "rows": batch["x"].mean()}, on_step=True, on_epoch=True)
        if self.trainer.is_global_zero:
            self.log("guarded", 1.0 + batch_idx, on_epoch=True, rank_zero_only=True)
        self.log("largest", batch["x"].max(), reduce_fx="max", on_step=True, on_epoch=True, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.log("end of epoch", float(self.current_epoch), sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("val", loss)
        self.log("val step", loss, on_step=True, on_epoch=True)
        self.log(f"val of {dataloader_idx}", loss, add_dataloader_idx=False)
        self.log("val sum", loss * len(batch["x"]), reduce_fx="sum", sync_dist=True)
        return {"loss": loss, "index": batch["index"]}

    def on_validation_epoch_end(self) -> None:
        self.log("end of validation", 2.0 * self.current_epoch)


class MetricsModule(Base):
    """Every kind of torchmetrics object and every way to use one."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.f1 = MulticlassF1Score(4, average="macro")
        self.mean, self.sum, self.max, self.min = MeanMetric(), SumMetric(), MaxMetric(), MinMetric()
        self.weighted = MeanMetric()
        self.cat, self.pearson, self.auroc = CatMetric(), torchmetrics.PearsonCorrCoef(), BinaryAUROC()
        kinds = {
            "precision": MulticlassPrecision(4),
            "f1": MulticlassF1Score(4),
            "top2": MulticlassAccuracy(4, top_k=2),
        }
        self.collection = torchmetrics.MetricCollection(kinds, prefix="all/")
        self.val_collection = torchmetrics.MetricCollection([MulticlassPrecision(4), MulticlassF1Score(4)])
        self.of_input = MeanMetric()
        self.val_mean, self.val_auroc = MeanMetric(), BinaryAUROC()
        self.by_hand: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.trainer.training:
            self.of_input.update(x.mean(1))  # before the first module: stage 0 has it
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, y = self(batch["x"]), batch["y"]
        losses = nn.functional.cross_entropy(logits, y, reduction="none")
        prediction = logits.softmax(1)
        self.accuracy(prediction, y)
        self.f1(prediction, y)
        self.collection(prediction, y)
        self.mean(losses)
        for metric in (self.sum, self.max, self.min):
            metric.update(losses)
        self.weighted.update(losses, weight=batch["index"].float() + 1)
        self.cat.update(losses)
        self.pearson.update(prediction[:, 0], y.float())
        self.auroc.update(prediction[:, 1], (y == 1).long())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("f1", self.f1, on_step=True, on_epoch=True)
        self.log("mean", self.mean)
        self.log("sum", self.sum, on_step=False, on_epoch=True)
        self.log("input", self.of_input, on_step=False, on_epoch=True)
        self.log("renamed", self.weighted, on_step=False, on_epoch=True, metric_attribute="weighted")
        self.log_dict(self.collection, on_step=True, on_epoch=True)
        return losses.mean()

    def on_train_epoch_end(self) -> None:
        values = {n: getattr(self, n).compute() for n in ("max", "min", "cat", "pearson", "auroc")}
        self.log("pearson", values["pearson"])
        again = self.cat.compute()
        assert torch.equal(again, values["cat"])
        self.by_hand.append(values)
        for name in values:
            getattr(self, name).reset()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch["x"])
        self.val_mean.update(nn.functional.cross_entropy(logits, batch["y"], reduction="none"))
        self.val_auroc.update(logits.softmax(1)[:, 1], (batch["y"] == 1).long())
        self.val_collection.update(logits, batch["y"])
        self.log("val mean", self.val_mean)
        return {"hits": (logits.argmax(1) == batch["y"]).float()}

    def on_validation_epoch_end(self) -> None:
        self.log("val auroc", self.val_auroc.compute())
        self.val_auroc.reset()
        self.log_dict(self.val_collection.compute())
        self.val_collection.reset()


class CallbackMetric(L.Callback):
    """A metric of a callback, fed with what `validation_step` returns."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.hits, self.all = SumMetric(), CatMetric()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        self.hits.update(outputs["hits"])
        self.all.update(outputs["hits"])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.values.append(float(self.hits.compute()))
        self.values += [float(x) for x in self.all.compute()]
        pl_module.log("hits", self.hits.compute())


class Outputs(L.Callback):
    """Keeps what callbacks are given after each batch."""

    def __init__(self) -> None:
        self.train: list[dict[str, Any]] = []
        self.bars: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.train.append({k: v.tolist() if isinstance(v, Tensor) else v for k, v in outputs.items()})

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.bars.append(dict(trainer.progress_bar_metrics))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bars.append(dict(trainer.progress_bar_metrics))


class OnOneReplica(Base):
    """Logs a key on the first replica only."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and 0 in batch["index"] % 2:
            self.log("even", 1.0)
        return super().training_step(batch, batch_idx)


class OwnReduction(Base):
    """Logs with a function of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("median", loss.detach(), reduce_fx=lambda x: x.median())
        return loss


class MetricOnTwoStages(Base):
    """Updates one metric with the input and with the output."""

    def __init__(self) -> None:
        super().__init__()
        self.size = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        self.size.update(x.mean())
        out = super().forward(x)
        self.size.update(out.mean())
        return out


class WithHyperparameters(Base):
    """Keeps the arguments that it was made with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()


class Watch(L.Callback):
    """Has W&B watch the partitioned module."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logger.watch(pl_module, log="all", log_freq=1, log_graph=False)


class Scored(Base):
    """Logs a score that is best after the second epoch, and lowers its learning rate by it."""

    scores = (3.0, 1.0, 2.0, 2.5, 4.0, 0.0)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("score", self.scores[self.current_epoch] + loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "score"}}


class FineTuned(Base):
    """Has a backbone that starts frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([self.stem, *self.blocks])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)
