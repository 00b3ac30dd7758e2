"""Refuses collectives and changes of options that a hook of one replica only makes: the others would hang or differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.contract.layouts import assert_same_weights
from tests.distributed.contract.one_replica_jobs import MODULES, fit, train_by_rate
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import quick


@pytest.mark.feature("collectives of hooks on one replica only", refused=True)
@pytest.mark.parametrize(
    ("layout", "kind"),
    quick([(x, k) for x in ("dp2", "fsdp2") for k in MODULES], ("dp2", "LogsOnRankZero"), ("fsdp2", "Saves")),
)
def test_collectives_of_one_replica_are_refused(ranks2: RankGroup, tmp_path: Path, layout: str, kind: str) -> None:
    with pytest.raises(RankError, match=rf"after `\w+`, at .*replica \d {MODULES[kind][1]}") as caught:
        ranks2.call(fit, layout, kind, str(tmp_path), timeout_seconds=30)
    assert caught.value.kind == "PartitionError"


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "dp2"))
def test_learning_rates_of_one_replica_are_refused(ranks2: RankGroup, layout: str) -> None:
    message = r"`lr` of group 0 of SGD is 0\.\d+ on rank 0, and 0\.\d+ on rank 1.*`on_train_batch_end` \(.*jobs.py:\d+"
    with pytest.raises(RankError, match=message):
        ranks2.call(train_by_rate, layout, alike=False)


@pytest.mark.feature("learning rates that hooks compute from all samples")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2"], "fsdp2"))
def test_learning_rates_of_all_replicas_are_exact(ranks2: RankGroup, layout: str) -> None:
    expected = reference(train_by_rate, None, True)
    assert_same_weights(ranks2.call(train_by_rate, layout, True)[0], expected)
