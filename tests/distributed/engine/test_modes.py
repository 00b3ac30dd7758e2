"""A module that the user has put into evaluation mode stays in it: training under a layout equals one process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights
from tests.harness import RankGroup
from tests.pairwise import quick


class Frozen(Classifier):
    """With a BatchNorm and a Dropout that are never in training mode, as those of a pretrained backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.5)).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return super().forward(self.frozen(x))


def fit(layout: str | None) -> dict[str, Any]:
    """Trains the module; its weights, and the modes afterwards."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Frozen()
    trainer, replicas = trainer_for(layout)
    trainer.validate(module, DataLoader(Numbers(32), batch_size=16 // replicas), verbose=False)
    modes = module.training, module.frozen.training
    trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    return {"weights": weights(trainer, module), "modes": (*modes, module.training, module.frozen[0].training)}


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "fsdp2", "pp2"))
def test_training_modes_are_the_users(ranks2: RankGroup, layout: str) -> None:
    expected, found = fit(None), ranks2.call(fit, layout)
    for result in found:
        assert result["modes"] == expected["modes"] == (True, False, True, False)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)
