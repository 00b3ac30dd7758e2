"""Copies of weights that a hook keeps, and that the step computes with: a penalty on the distance from them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.engine.state_jobs import WIDTH, Plain
from tests.distributed.jobs import quiet, verified_trainer_for, weights
from tests.harness import RankError, RankGroup
from tests.pairwise import quick


class Start(Plain):
    """The distance from the weights at the start of training."""

    def on_train_start(self) -> None:
        self.start = {name: p.detach().clone() for name, p in self.named_parameters()}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        penalties = [(p - self.start[name]).square().sum() for name, p in self.named_parameters()]
        return self.loss(batch) + 0.1 * sum(penalties)


class Importance(Plain):
    """Each distance with a weight of its own, computed by the hook."""

    def on_train_epoch_start(self) -> None:
        self.pairs = [(p.detach() + 0.1, p.detach().abs()) for p in self.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        distances = zip(self.parameters(), self.pairs, strict=True)
        return self.loss(batch) + sum((w * (p - q).square()).sum() for p, (q, w) in distances)


class ReadAtEnd(Start):
    """A hook reads the distance."""

    def on_train_end(self) -> None:
        self.moved = float(sum((p.detach() - self.start[n]).square().sum() for n, p in self.named_parameters()))


class ReadInStep(Start):
    """The step reads the norm of a copy."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch) * sum(float(kept.norm()) for kept in self.start.values())


class AddedToLoss(Start):
    """The loss has sums of copies."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch) + 0.01 * sum(kept.sum() for kept in self.start.values())


def fit(layout: str | None, kind: type[Plain]) -> dict[str, Any]:
    """Trains a module; its weights, and what was verified."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = kind()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, WIDTH, generator=generator), torch.randn(24, 4, generator=generator))
    trainer, replicas = verified_trainer_for(layout, max_epochs=2)
    trainer.fit(module, DataLoader(data, batch_size=8 // replicas))
    return {"weights": weights(trainer, module), "verified": str(getattr(trainer.strategy, "verification", ""))}


@pytest.mark.feature("penalties on weights that hooks keep")
@pytest.mark.parametrize(
    ("layout", "kind"),
    quick([(y, k) for y in ("dp2", "pp2") for k in (Start, Importance)], ("pp2", Start)),
)
def test_weights_are_those_of_one_process(ranks2: RankGroup, layout: str, kind: type[Plain]) -> None:
    expected, found = fit(None, kind), ranks2.call(fit, layout, kind)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert all("largest relative difference" in result["verified"] for result in found)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hook"), [(ReadAtEnd, "on_train_end"), (ReadInStep, "genexpr|training_step")])
def test_values_of_other_stages_are_refused(ranks2: RankGroup, kind: type[Plain], hook: str) -> None:
    with pytest.raises(RankError, match=rf"stages?: .*test_kept_weights.py:\d+ \(<?({hook})>?\) reads") as caught:
        ranks2.call(fit, "pp2", kind)
    assert caught.value.kind == "PartitionError"


@pytest.mark.slow
def test_losses_with_values_of_other_stages_are_refused(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"the loss of .*test_kept_weights.py:\d+ .*a copy of its weights that a hook"):
        ranks2.call(fit, "pp2", AddedToLoss)
