"""Bounds on the batch as a whole, which the verified batch does not reach, make a pipeline use one microbatch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
from torch.utils.data import DataLoader, Dataset

from tests.distributed.ghosts.test_user_code import Rows, compare
from tests.distributed.jobs import quiet, verified_trainer_for
from tests.distributed.verification import bound_modules
from tests.harness import RankGroup
from tests.pairwise import quick

KINDS = ["Clamped", "Trimmed", "Scaled", "Skipped", "Words"]
FEATURE = "bounds on the batch as a whole that come later"


class Words(Dataset):
    """The labels of `Rows`, without numbers."""

    def __init__(self) -> None:
        self.rows = Rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value for key, value in self.rows[index].items() if isinstance(value, int)}


def microbatches(kind: str) -> Any:
    """Trains one step; the number of microbatches that is used from there on."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = getattr(bound_modules, kind)()
    trainer, _ = verified_trainer_for("pp2", max_steps=1)
    trainer.fit(module, DataLoader(Words() if kind == "Words" else Rows(), batch_size=8))
    strategy: Any = trainer.strategy
    return strategy.engine.runner.pipeline.parts


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(("kind", "layout"), quick([(k, y) for k in KINDS for y in ("pp2",)], ("Trimmed", "pp2")))
def test_equals_one_process(ranks2: RankGroup, kind: str, layout: str) -> None:
    compare(ranks2, layout, getattr(bound_modules, kind))


@pytest.mark.parametrize(("kind", "divided"), [*((k, False) for k in KINDS), ("Elementwise", True), ("Late", True)])
def test_number_of_microbatches(ranks2: RankGroup, kind: str, divided: bool) -> None:
    assert all((parts > 1) == divided for parts in ranks2.call(microbatches, kind))
