"""Hooks that a user puts on gradients run under every layout, whenever they are put on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.distributed.engine import optimizer_jobs as jobs
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

STEPS = 3
ONE_MICROBATCH: dict[str, Any] = {"strategy_options": {"microbatches": 1}}


def check(results: list[dict], expected: dict, runs: int = STEPS) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)
    for kind in ("computed", "accumulated"):
        assert {r["fired"][kind] for r in results} <= {0, runs}
        assert any(r["fired"][kind] for r in results), f"{kind}: on the ranks that hold the weight"


@pytest.fixture(scope="module")
def one() -> dict[str, dict]:
    found = {
        when: reference(jobs.hooked, None, {"when": when}) for when in ("__init__", "configure_model", "on_train_start")
    }
    expected = found["__init__"]
    assert expected["fired"] == {"computed": STEPS, "accumulated": STEPS}
    unchanged = reference(jobs.hooked, None, {})["weights"]["blocks.1.up.weight"]
    assert not torch.allclose(expected["weights"]["blocks.1.up.weight"], unchanged, atol=1e-3)
    return found


@pytest.mark.parametrize(
    ("layout", "when"),
    quick(
        itertools.product(["dp2", "fsdp2", "tp2", "pp2"], ["__init__", "configure_model", "on_train_start"]),
        ("dp2", "configure_model"),
        ("fsdp2", "on_train_start"),
        ("tp2", "__init__"),
        ("pp2", "on_train_start"),
    ),
)
def test_hooks_on_gradients(ranks2: RankGroup, one, layout, when):
    options: dict[str, Any] = ONE_MICROBATCH if "pp" in layout else {}
    check(ranks2.call(jobs.hooked, layout, {"when": when}, **options), one[when])


@pytest.mark.parametrize("layout", quick(["fsdp2-tp2", "fsdp2-pp2"], "fsdp2-pp2"))
def test_products(ranks4: RankGroup, one, layout):
    options: dict[str, Any] = ONE_MICROBATCH if "pp" in layout else {}
    check(ranks4.call(jobs.hooked, layout, {"when": "__init__"}, **options), one["__init__"])


def test_once_a_microbatch_in_a_pipeline(ranks2: RankGroup, one):
    results = ranks2.call(jobs.hooked, "pp2", {"when": "__init__"}, strategy_options={"microbatches": 2})
    check(results, one["__init__"], 2 * STEPS)


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_a_penalty_on_gradients(ranks2: RankGroup, layout):
    expected = reference(jobs.hooked, None, {"penalty": True})["weights"]
    found = ranks2.call(jobs.hooked, layout, {"penalty": True})[0]["weights"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", ["fsdp2", "pp2"])
def test_a_penalty_on_gradients_is_refused_where_it_cannot_be(ranks2: RankGroup, layout):
    with pytest.raises(RankError, match=rf"`layout='{layout}'`.*`torch.autograd.grad`.*`dp` or `tp`"):
        ranks2.call(jobs.hooked, layout, {"penalty": True})
