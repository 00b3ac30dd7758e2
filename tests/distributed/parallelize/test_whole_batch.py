"""Steps that run on a whole batch only: a pipeline does not split their batches."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid import Layout
from tests.distributed.engine.state_jobs import WIDTH, Plain
from tests.distributed.jobs import quiet, verified_trainer_for, weights
from tests.harness import RankError, RankGroup
from tests.pairwise import quick


class Hardest(Plain):
    """A loss of the two hardest samples."""

    def training_step(self, batch, batch_idx):
        losses = F.mse_loss(self(batch[0]), batch[1], reduction="none").mean(1)
        return losses.topk(2).values.mean()


class Ranked(Plain):
    def training_step(self, batch, batch_idx):
        losses = F.mse_loss(self(batch[0]), batch[1], reduction="none").mean(1)
        return losses.kthvalue(3).values + losses.sort().values[:3].mean()


class Viewed(Plain):
    """Groups of samples, of a fixed number."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]).view(4, -1, 4).mean(1), batch[1].view(4, -1, 4).mean(1))


class Fourth(Plain):
    """A sample with a role of its own."""

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        return F.mse_loss(out, batch[1]) + out[3].square().mean()


class Halves(Plain):
    def training_step(self, batch, batch_idx):
        labeled, other = batch[0].chunk(2)
        return F.mse_loss(self(labeled), batch[1].chunk(2)[0]) + self(other).square().mean()


class Checked(Plain):
    """Two samples at least."""

    def training_step(self, batch, batch_idx):
        assert len(batch[0]) >= 2, "a batch has two samples at least"
        return self.loss(batch)


def fit(layout: str | None, kind: type, samples: int = 24, batch: int = 8, **options: Any) -> dict[str, torch.Tensor]:
    """Trains a module; its weights."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = kind()
    trainer, replicas = verified_trainer_for(layout, strategy_options=options or None, max_epochs=2)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*(torch.randn(samples, width, generator=generator) for width in (WIDTH, 4)))
    trainer.fit(module, DataLoader(data, batch_size=batch // replicas))
    return weights(trainer, module)


@functools.cache
def expected_of(kind: type, *sizes: int) -> dict[str, torch.Tensor]:
    return fit(None, kind, *sizes)


def check(request: pytest.FixtureRequest, layout: str, kind: type, *sizes: int, **options: Any) -> None:
    ranks: RankGroup = request.getfixturevalue("ranks2" if Layout.parse(layout).devices == 2 else "ranks4")
    found, expected = ranks.call(fit, layout, kind, *sizes, **options)[0], expected_of(kind, *sizes)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


KINDS = (Hardest, Ranked, Viewed, Fourth, Halves, Checked)
FEATURE = "a step that runs on a whole batch only"


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("kind", "layout"), quick([(k, y) for k in KINDS for y in ("pp2", "tp2-pp2")], (Hardest, "pp2"))
)
def test_a_step_that_fails_on_parts_has_the_whole_batch(
    request: pytest.FixtureRequest, kind: type, layout: str
) -> None:
    check(request, layout, kind)


@pytest.mark.slow
@pytest.mark.feature(FEATURE, layout="dp2-pp2")
def test_each_replica_has_its_whole_batch(request: pytest.FixtureRequest) -> None:
    check(request, "dp2-pp2", Checked)


@pytest.mark.slow
def test_a_last_batch_whose_parts_fail_stays_whole(request: pytest.FixtureRequest) -> None:
    check(request, "pp2", Checked, 20, 16)  # 8 microbatches of 2 samples, then 4 samples
    check(request, "pp2", Checked, 20, 16, microbatches=8)


@pytest.mark.parametrize("kind", quick([Hardest, Fourth, Halves, Checked], Hardest))
def test_requested_microbatches_are_refused_where_parts_fail(ranks2: RankGroup, kind: type) -> None:
    line = r"fails at \S*test_whole_batch.py:\d+ \(training_step\) with \w+: .*, and on the whole batch it runs"
    with pytest.raises(RankError, match=rf"(?s)`microbatches=8` cannot .*{line}.* Use `microbatches=1`") as error:
        ranks2.call(fit, "pp2", kind, microbatches=8)
    assert error.value.kind == "PartitionError"
