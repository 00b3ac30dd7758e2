"""State that replicas compute from their own samples is refused if a step computes with it, and only then."""

from __future__ import annotations

import re

import pytest

from tests.distributed.engine.test_state import compare
from tests.distributed.verification.drift_jobs import EXACT, REFUSED, fit, fit_with_warnings, fit_without_exchange
from tests.harness import RankError, RankGroup
from tests.pairwise import quick


@pytest.mark.feature("state of replicas in attributes")
@pytest.mark.parametrize("layout", ["dp2", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", quick(list(REFUSED), "Shift", "InHook", "Growing", "Chosen"))
def test_what_a_replica_computes_from_its_samples_is_refused(ranks2: RankGroup, layout: str, kind: str) -> None:
    with pytest.raises(RankError, match=REFUSED[kind]) as caught:
        ranks2.call(fit, layout, kind)
    assert caught.value.kind == "PartitionError"


@pytest.mark.feature("state of replicas in attributes")
@pytest.mark.parametrize("layout", [pytest.param("dp2", marks=pytest.mark.slow), "fsdp2"])
@pytest.mark.parametrize("kind", quick(list(EXACT), "OnlyShown"))
def test_what_is_equal_or_of_no_effect_is_exact(ranks2: RankGroup, layout: str, kind: str) -> None:
    compare(fit(None, kind), ranks2.call(fit, layout, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Smoothed", "InBuffer"])
def test_pipelines_that_are_replicas(ranks4: RankGroup, kind: str) -> None:
    with pytest.raises(RankError, match=REFUSED[kind]):
        ranks4.call(fit, "dp2-pp2", kind)
    compare(fit(None, "Agreed"), ranks4.call(fit, "dp2-pp2", "Agreed"))


@pytest.mark.slow
def test_pools_of_samples_are_a_warning(ranks2: RankGroup) -> None:
    assert any("computes `pool`" in text for text in ranks2.call(fit_with_warnings, "dp2", "Pool")[0])
    with pytest.raises(RankError, match="computes `pool`"):
        ranks2.call(fit_with_warnings, "dp2", "Pool", verify="strict")
    assert not any("computes `" in text for text in ranks2.call(fit_with_warnings, "dp2", "Pool", verify="off")[0])


@pytest.mark.parametrize("kind", quick(["Queue", "Hidden"], "Queue"))
def test_stages_that_keep_their_own_state_are_found(ranks2: RankGroup, kind: str) -> None:
    assert re.search(r"leaves `\w+` in another state than one process does", ranks2.call(fit_without_exchange, kind)[0])
