"""Replicas whose steps differ, and code of the user over weights: equal to one process, or refused with the line."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed.replicas.module_jobs import fit
from tests.harness import RankError, RankGroup
from tests.pairwise import quick
from tests.support import refused

EXACT = {
    "Heads": "replicas that call different modules",
    "NormedHeads": "replicas that call different modules, with BatchNorm",
    "ManualHeads": "replicas that call different modules, manual optimization",
    "Masked": "modules that some replicas do not need",
    "Routed": "parts of blocks that some replicas do not need",
    "DeadEnd": "results that some replicas do not need",
    "ScalarOfOne": "scalars that some replicas do not need",
    "Penalty": "weight penalties over `parameters()`",
    "Teacher": "parameters written in the step",
    "WithInit": "optimizers made with the module",
    "Contrastive": "`all_gather` in the step",
    "Clipped": "`clip_grad_norm_` called by the user",
    "Norms": "subclasses and functions of batch normalization",
    "NoLoss": "steps without a loss",
    "Later": "other modules from a step on",
    "StopsInStep": "`should_stop` set on one rank",
}
REFUSED = {
    "LaterOnOne": (
        r"in `training_step`, at .*module_jobs.py:\d+ \(forward\), replica \d (needs|returns).*`blocks",
        "fsdp2",
    ),
    "NoLossOfOne": (r"module_jobs.py:\d+ \(training_step\), replica 0 returns no loss, but replica 1", "dp2"),
    "Unregistered": (r"returned SGD with `shift`, which is no parameter of Unregistered", "dp2"),
    "Prototype": (r"module_jobs.py:\d+ \(training_step\) writes the parameter `offset`", "fsdp2"),
}


@cache
def expected(name: str, **options: Any) -> dict[str, Any]:
    return fit(name, None, **options)


def assert_same(found: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    for result in found:
        assert result["steps"] == wanted["steps"]
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(wanted["losses"]), rtol=1e-4, atol=1e-5)
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.feature(by="feature", prefix="")
@pytest.mark.parametrize(
    ("name", "feature", "layout"),
    quick(
        [(name, feature, layout) for name, feature in EXACT.items() for layout in ("dp2", "fsdp2")],
        *((n, EXACT[n], "fsdp2") for n in ("Heads", "Masked", "Routed", "Teacher", "WithInit", "Contrastive")),
        *((n, EXACT[n], "fsdp2") for n in ("Later", "NoLoss", "Clipped")),
        *((n, EXACT[n], "dp2") for n in ("Norms", "StopsInStep", "NormedHeads")),
    ),
)
def test_a_step_equals_one_process(ranks2: RankGroup, name: str, feature: str, layout: str) -> None:
    assert_same(ranks2.call(fit, name, layout), expected(name))


@pytest.mark.feature(by="feature", prefix="")
@pytest.mark.parametrize(
    ("name", "feature", "layout"),
    quick(
        [
            (n, EXACT[n], layout)
            for n in ("WithInit", "Contrastive", "StopsInStep", "Clipped")
            for layout in ("tp2", "pp2")
        ],
        ("Contrastive", EXACT["Contrastive"], "pp2"),
    ),
)
def test_a_step_of_one_replica_equals_one_process(ranks2: RankGroup, name: str, feature: str, layout: str) -> None:
    assert_same(ranks2.call(fit, name, layout), expected(name))


@pytest.mark.slow
@pytest.mark.feature(by="feature", prefix="")
@pytest.mark.parametrize("layout", ["dp2-pp2", "dp2-fsdp2", "fsdp2-tp2", "fsdp2-pp2"])
@pytest.mark.parametrize(("name", "feature"), [(n, EXACT[n]) for n in ("Contrastive", "WithInit", "Clipped")])
def test_products_equal_one_process(ranks4: RankGroup, name: str, feature: str, layout: str) -> None:
    assert_same(ranks4.call(fit, name, layout), expected(name))


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "tp2"))
def test_a_callback_of_one_rank_stops_all(ranks2: RankGroup, layout: str) -> None:
    assert_same(ranks2.call(fit, "Net", layout, stops=True), expected("Net", stops=True))
    assert expected("Net", stops=True)["steps"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_a_rank_that_stops_unseen_is_followed_after_the_next_step(ranks2: RankGroup, layout: str) -> None:
    assert [result["steps"] for result in ranks2.call(fit, "StopsUnseen", layout)] == [4, 4]


@pytest.mark.parametrize("name", quick(REFUSED, "LaterOnOne", "Unregistered"))
def test_what_would_differ_is_refused_with_the_line(
    ranks2: RankGroup, request: pytest.FixtureRequest, name: str
) -> None:
    message, layout = REFUSED[name]
    with pytest.raises(RankError, match=message) as error:
        ranks2.call(fit, name, layout)
    assert error.value.kind == "PartitionError"
    refused(request)


@pytest.mark.slow
def test_a_batch_that_is_accumulated_may_use_other_modules(ranks2: RankGroup) -> None:
    for name in ("Heads", "Masked"):
        options = {"accumulate_grad_batches": 2}
        assert_same(ranks2.call(fit, name, "fsdp2", **options), expected(name, **options))
