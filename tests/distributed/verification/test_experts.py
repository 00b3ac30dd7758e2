"""Under `ep`, the state that a step leaves and the values that it reports are compared with one process, too."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.nn import functional as F  # noqa: N812 -- its usual name
from torch.utils.data import DataLoader

from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import Numbers, quiet, verified_trainer_for
from tests.harness import RankError, RankGroup


class Reports(Mixture):
    """Returns rows, logs means and sums, and keeps a moving average; the experts count what comes to their rank."""

    def __init__(self) -> None:
        super().__init__(experts="Counting", blocks=2)
        self.last = torch.zeros(4)

    def training_step(self, batch, batch_idx):
        out = self(batch["x"])
        right = (out.argmax(1) == batch["y"]).float()
        self.log("right", right.mean())
        self.log("count", right.sum(), reduce_fx="sum")
        self.last = out.detach()
        return {"loss": F.cross_entropy(out, batch["y"]), "rows": out.detach()}


class LogsTokens(Reports):
    """Logs the tokens that the experts of this rank got, of all ranks."""

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        self.log("came", float(self.blocks[0].experts.came))
        return out


class ReturnsTokens(Reports):
    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        return {**out, "came": torch.tensor(float(self.blocks[0].experts.came))}


class KeepsTokens(Reports):
    seen = 0

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        self.seen = self.blocks[0].experts.came
        return out


def fit(kind: type[Mixture], **options: Any) -> list[str]:
    """Trains a step; the warnings."""
    quiet()
    L.seed_everything(7, verbose=False)
    trainer, replicas = verified_trainer_for("ep2", max_steps=1, strategy_options=options)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(kind(), DataLoader(Numbers(), batch_size=16 // replicas))
    return [str(w.message) for w in found if "other values than one process" in str(w.message)]


def test_values_of_own_tokens_are_exact(ranks2: RankGroup) -> None:
    assert ranks2.call(fit, Reports, verify="strict") == [[], []]


@pytest.mark.parametrize(("kind", "text"), [(LogsTokens, "`came` is"), (ReturnsTokens, "`training_step['came']`")])
def test_values_of_the_tokens_of_experts_are_a_warning(ranks2: RankGroup, kind: type, text: str) -> None:
    (message,) = ranks2.call(fit, kind)[0]
    assert text in message


def test_state_from_the_tokens_of_experts_is_refused(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="leaves `seen` in another state than one process does"):
        ranks2.call(fit, KeepsTokens)
