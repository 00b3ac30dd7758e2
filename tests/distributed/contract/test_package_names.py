"""Projects that import `pytorch_lightning`: its Trainer, module, data and callbacks with our strategy and callbacks."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.strategies import Strategy
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelSummary,
)
from pytorch_lightning.strategies import ParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_hybrid import HybridStrategy, Layout
from lightning_hybrid.callbacks import Phase, PhaseSchedule, TokenThroughput
from tests.distributed.jobs import Block, Numbers
from tests.harness import RankGroup
from tests.pairwise import quick


class Module(pl.LightningModule):
    """Blocks, with a hook before the batch is moved, metrics and a gradient norm that a hook logs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem, self.head = nn.Linear(16, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val": nn.functional.cross_entropy(self(batch["x"]), batch["y"])})

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch["x"])

    def on_validation_epoch_end(self) -> None:
        self.log("steps", float(self.global_step))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Data(pl.LightningDataModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Numbers(40), batch_size=self.size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Numbers(20), batch_size=self.size)

    predict_dataloader = val_dataloader


class Freeze(BaseFinetuning):
    """Trains the stem from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.stem)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.stem, optimizer)


class Seen(BasePredictionWriter):
    """Keeps the samples of each prediction batch."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.seen: list[Any] = []

    def write_on_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(args[3])


def verified_trainer_for(
    layout: str | None, folder: str | Path, callbacks: Any, epochs: int = 2
) -> tuple[pl.Trainer, int]:
    parsed = Layout.parse(layout or "dp1")
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="auto" if layout is None else HybridStrategy(layout),
        devices=parsed.devices,
        max_epochs=epochs,
        logger=False,
        callbacks=callbacks,
        gradient_clip_val=0.5,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    return trainer, parsed.replicas


def run(layout: str | None, folder: str) -> dict[str, Any]:
    """Fits with callbacks, resumes in another Trainer, and predicts."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pl.seed_everything(3, verbose=False)
    module, average = Module(), EMAWeightAveraging(decay=0.8)
    saved = ModelCheckpoint(folder, "{epoch}", save_last=True, monitor="val")
    first, replicas = verified_trainer_for(layout, folder, [saved, Freeze(), ModelSummary(1)])
    data = Data(16 // replicas)
    first.fit(module, data)
    again, seen = Module(), Seen()
    second, _ = verified_trainer_for(layout, folder, [average, seen], epochs=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`|The checkpoint was not created with")
        second.fit(again, data, ckpt_path=f"{folder}/last.ckpt", weights_only=False)
    predictions = second.predict(again, data)
    strategy: Any = second.strategy
    whole = again.state_dict() if layout is None else strategy.full_state_dict()
    return {
        "weights": {k: v.clone() for k, v in whole.items()},
        "metrics": {k: float(v) for t in (first, second) for k, v in t.callback_metrics.items()},
        "score": float(saved.best_model_score),  # type: ignore[arg-type]
        "predictions": None if predictions is None else torch.cat(predictions),  # type: ignore[arg-type]
        "seen": sorted(i for batch in seen.seen for i in batch),
    }


@pytest.mark.feature("`import pytorch_lightning`")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "pp2"))
def test_the_other_name_of_lightning_is_exact(ranks2: RankGroup, tmp_path: Path, layout: str) -> None:
    expected, found = run(None, str(tmp_path / "one")), ranks2.call(run, layout, str(tmp_path / "many"))
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for result in found:
        assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
        assert result["score"] == pytest.approx(expected["score"], rel=1e-4)
        torch.testing.assert_close(result["predictions"], expected["predictions"], rtol=1e-4, atol=1e-5)
    replicas = Layout.parse(layout).replicas
    assert sorted({i for result in found for i in result["seen"]}) == expected["seen"] == list(range(20))
    assert sum(len(result["seen"]) for result in found) == 20 * len(found) / replicas


def with_our_callbacks(layout: str, folder: str) -> list[float]:
    """Phases and throughput under `pl.Trainer`, one callback given without a list; the learning rates of all steps."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(3, verbose=False)
    throughput = TokenThroughput()
    trainer, replicas = verified_trainer_for(layout, f"{folder}/1", throughput, epochs=1)
    trainer.fit(Module(), Data(8 // replicas))
    assert throughput in trainer.callbacks  # type: ignore[attr-defined]
    phases = PhaseSchedule([Phase(batch_size=8), Phase(at_step=3, batch_size=16)])
    trainer, replicas = verified_trainer_for(layout, f"{folder}/2", [phases], epochs=1)
    trainer.fit(Module(), Data(8 // replicas))
    return [float(trainer.callback_metrics["loss_epoch"]), trainer.global_step]


def test_callbacks_of_this_package_with_the_other_name(ranks2: RankGroup, tmp_path: Path) -> None:
    loss, steps = ranks2.call(with_our_callbacks, "dp2", str(tmp_path))[0]
    assert steps == 4  # 3 of 8 samples, 1 of 16
    assert 0 < loss < 2


def test_objects_belong_to_the_package_of_the_trainer() -> None:
    strategy = HybridStrategy("dp1")
    assert isinstance(strategy, Strategy)
    assert isinstance(strategy, HybridStrategy)
    assert isinstance(strategy, ParallelStrategy)
    pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
    assert next(k for k in type(strategy).__mro__ if k.__name__ == "ParallelStrategy").__module__.startswith("pytorch_")
    assert type(strategy).__name__ == "HybridStrategy"
    named = pl.Trainer(accelerator="cpu", devices=1, strategy="hybrid", logger=False).strategy
    assert isinstance(named, HybridStrategy)


class Named(HybridStrategy):
    """A user's subclass."""

    def setup_environment(self) -> None:
        """Marks the strategy."""
        self.marked = True
        super().setup_environment()


def test_subclasses_follow_the_trainer_as_well() -> None:
    strategy = Named("dp1")
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, barebones=True, max_steps=2)
    trainer.fit(Module(), Data(8))
    assert strategy.marked
    assert isinstance(strategy, Named)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda strategy: pickle.loads(pickle.dumps(strategy))])
def test_a_copy_is_an_unused_strategy_of_the_same_arguments(copied: Callable) -> None:
    """Modules of packages keep the arguments of their Trainer among their hyperparameters."""
    strategy = Named("dp1", microbatches=4, verify="off")
    pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, barebones=True, max_steps=1).fit(
        Module(), Data(8)
    )
    other = copied(strategy)
    assert isinstance(other, Named)
    assert other.request == Named("dp1", microbatches=4, verify="off").request
    with pytest.raises(AttributeError):
        _ = other.marked
    pl.Trainer(accelerator="cpu", devices=1, strategy=other, logger=False, barebones=True, max_steps=1).fit(
        Module(), Data(8)
    )
    assert other.verification == []
