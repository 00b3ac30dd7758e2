"""A project that imports `pytorch_lightning`, installed as it is: pytorch-tabular (`pip install pytorch-tabular`)."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from lightning_hybrid import HybridStrategy, Layout
from tests.harness import RankGroup

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("pytorch_tabular") is None, reason="needs pytorch-tabular, which is not installed"
    ),
]


def fit(layout: str | None, paths: list[str]) -> dict[str, Any]:
    """Trains a model of pytorch-tabular on a table, by its own data module."""
    sys.path[:] = paths
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rng, parsed = np.random.default_rng(0), Layout.parse(layout or "dp1")
    table = pd.DataFrame(rng.normal(size=(80, 3)).astype("float32"), columns=["a", "b", "c"])
    table["kind"] = rng.choice(["x", "y", "z"], 80)
    table["target"] = (table["a"] + table["b"] > 0).astype(int)
    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=["a", "b", "c"], categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-16", learning_rate=0.01),
        optimizer_config=OptimizerConfig(optimizer="SGD"),
        trainer_config=TrainerConfig(batch_size=16 // parsed.replicas, auto_select_gpus=False),
        verbose=False,
    )
    data = model.prepare_dataloader(train=table, seed=1)
    module = model.prepare_model(data)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=parsed.devices,
        strategy="auto" if layout is None else HybridStrategy(layout),
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(1, verbose=False)
    trainer.fit(module, datamodule=data)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {"weights": {k: v.clone() for k, v in module.state_dict().items()}, "metrics": metrics}


@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "tp2", "pp2"])
def test_a_project_with_the_other_name(ranks2: RankGroup, layout: str) -> None:
    expected = fit(None, sys.path)
    for found in ranks2.call(fit, layout, sys.path):
        for name, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
