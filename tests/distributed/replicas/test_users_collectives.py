"""Collectives that the user's code calls itself: over the replicas exact, over copies refused."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed import all_reduce
from torch.utils.data import DataLoader

from tests.distributed.jobs import Classifier, Numbers, quiet, verified_trainer_for
from tests.harness import RankError, RankGroup
from tests.pairwise import quick
from tests.support import refused


class Communicates(Classifier):
    """Communicates in the step, or in a hook."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__()
        self.where, self.what, self.samples = where, what, 0
        self.found: list[float] = []

    def training_step(self, batch, batch_idx):
        loss: Any = super().training_step(batch, batch_idx)
        if self.where == "training_step":
            self._communicate(len(batch["x"]))
        self.samples += len(batch["x"])
        return loss

    def on_train_epoch_end(self):
        if self.where == "hook":
            self._communicate(self.samples)

    def _communicate(self, count: int) -> None:
        value = torch.tensor(float(count))
        if self.what == "all_reduce":
            all_reduce(value)
        elif self.what == "all_gather_object":
            counts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(counts, count)
            value = torch.tensor(float(sum(counts)))
        else:
            dist.broadcast(value, 0)
        self.found.append(float(value))


def fit(layout: str, where: str, what: str) -> list[float]:
    quiet()
    L.seed_everything(7, verbose=False)
    module = Communicates(where, what)
    trainer, replicas = verified_trainer_for(layout)
    trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    return module.found


@pytest.mark.feature("user code: calls of `torch.distributed` in hooks")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "dp2", "tp2", "pp2"))
@pytest.mark.parametrize("what", quick(["all_reduce", "all_gather_object"], "all_reduce"))
def test_sums_over_copies_are_refused(
    request: pytest.FixtureRequest, ranks2: RankGroup, layout: str, what: str
) -> None:
    if layout in ("dp2", "fsdp2"):
        assert ranks2.call(fit, layout, "hook", what) == [[48.0]] * 2
        return
    with pytest.raises(RankError, match=rf"test_users_collectives.py:\d+ \(_communicate\).*`layout='{layout}'`"):
        ranks2.call(fit, layout, "hook", what)
    refused(request)


@pytest.mark.parametrize("layout", quick(["tp2", "pp2"], "pp2"))
def test_what_is_right_for_copies_runs(ranks2: RankGroup, layout: str) -> None:
    assert len({result[0] for result in ranks2.call(fit, layout, "hook", "broadcast")}) == 1


@pytest.mark.feature("user code: calls of `torch.distributed` in the step")
@pytest.mark.parametrize("layout", quick(["tp2", "pp2"], "pp2"))
def test_in_the_step(request: pytest.FixtureRequest, ranks2: RankGroup, layout: str) -> None:
    for what in ("all_reduce",) if layout == "tp2" else ("all_reduce", "broadcast"):
        with pytest.raises(RankError, match=rf"PartitionError: .*\(_communicate\).*`layout='{layout}'`"):
            ranks2.call(fit, layout, "training_step", what)
    refused(request)
