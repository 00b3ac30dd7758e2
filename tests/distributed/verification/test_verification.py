"""`verify`: a run compares its first step with one process; errors of the strategy are found before training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights
from tests.harness import RankGroup


class Random(Classifier):
    """With dropout in blocks, noise in the step, and state that the step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.counted = 0

    def training_step(self, batch, batch_idx):
        self.counted += 1
        x = batch.pop("x")
        batch["x"] = self.dropout(x) + 0.1 * torch.randn_like(x)
        return super().training_step(batch, batch_idx)


def fit(layout: str | None, verify: str, module: type = Classifier, **options: Any) -> dict[str, Any]:
    """Trains the module; weights, logs, rows of the last verification."""
    quiet()
    L.seed_everything(7, verbose=False)
    built = module()
    trainer, replicas = trainer_for(layout, strategy_options=None if layout is None else {"verify": verify}, **options)
    trainer.fit(built, DataLoader(Numbers(), batch_size=16 // replicas))
    verifier: Any = getattr(trainer.strategy, "_verifier", None)
    return {
        "weights": weights(trainer, built),
        "logs": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "rows": [] if verifier is None else verifier.rows,
    }


@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "tp2", "pp2"])
def test_verification_has_no_effect(ranks2: RankGroup, layout: str) -> None:
    with_it, without = ranks2.call(fit, layout, "start", Random)[0], ranks2.call(fit, layout, "off", Random)[0]
    assert with_it["rows"][0][0].startswith("loss and gradients of")
    assert "largest relative difference" in with_it["rows"][0][1], with_it["rows"]
    assert without["rows"] == []
    assert with_it["logs"] == without["logs"]
    for name, value in without["weights"].items():
        assert torch.equal(with_it["weights"][name], value), name
