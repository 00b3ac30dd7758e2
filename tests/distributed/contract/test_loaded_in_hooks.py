"""Hooks that copy weights by `state_dict` and load them again, as averages of weights in public code do."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
from torch.utils.data import DataLoader

from tests.distributed.contract import modules
from tests.distributed.contract.layouts import assert_equal, assert_same_weights, call
from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import Numbers, quiet, trainer_for, weights
from tests.distributed.reference import reference
from tests.pairwise import quick


class Average(L.Callback):
    """Validates with an exponential moving average of the weights."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = {k: v.detach().clone() for k, v in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for name, value in pl_module.state_dict().items():
            self.average[name].copy_(0.5 * self.average[name] + 0.5 * value)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.kept = {k: v.detach().clone() for k, v in pl_module.state_dict().items()}
        pl_module.load_state_dict(self.average)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.load_state_dict(self.kept)


def fit(layout: str | None, experts: bool) -> dict[str, Any]:
    """Trains for two epochs; weights and metrics."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Mixture(blocks=2) if experts else modules.Base()
    trainer, replicas = trainer_for(layout, max_epochs=2, callbacks=[Average()])
    loader = DataLoader(Numbers(), batch_size=16 // replicas)
    trainer.fit(module, loader, loader)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {"weights": weights(trainer, module), "metrics": metrics}


@pytest.mark.feature("an average of weights by a callback of the user")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2", "ep2", "fsdp2-tp2"], "fsdp2", "ep2"))
def test_weights_are_loaded_in_hooks(request: pytest.FixtureRequest, layout: str) -> None:
    expected = reference(fit, None, layout == "ep2")
    results = call(request, layout, fit, layout == "ep2")
    assert_same_weights(results[0]["weights"], expected["weights"])
    for result in results:
        assert_equal(result["metrics"], expected["metrics"], tolerance=1e-4)
