"""Copies of experts share the tokens of a hot one, and the result stays that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.reshard import relayout_jobs as jobs
from tests.harness import RankError, RankGroup
from tests.pairwise import slow

MIXTURE: dict[str, Any] = {"kind": "Mixture", "steps": 6, "module_options": {"adamw": True, "favorite": True}}
HOSTS = ((0, 1, 2), (0, 1, 3))
"""All tokens go to the first two experts, which both ranks compute."""


@pytest.fixture(scope="module")
def plain(ranks2: RankGroup) -> dict[str, Any]:
    return ranks2.call(jobs.train, "dp2", **MIXTURE)[0]


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["changed"] == [], "copies are no weights of their own"
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=1e-6)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("ep2", {}),
        slow("ep2", {"strategy_options": {"recompute": "full"}}),
        slow("fsdp2-ep2", {}),
        slow("dp2-ep2", {"accumulate_grad_batches": 2}),
        slow("ep2-pp2", {}),
        slow("ep2-pp2", {"strategy_options": {"schedule": "ZBVZeroBubble"}}),
        slow("ep2-tp2", {}),
    ],
    ids=["ep", "recomputed", "sharded", "accumulated", "pipeline", "zero bubble", "tensor"],
)
def test_tokens_are_shared(
    request: pytest.FixtureRequest, plain: dict[str, Any], layout: str, options: dict[str, Any]
) -> None:
    ranks = request.getfixturevalue("ranks4" if "-" in layout else "ranks2")
    found = ranks.call(jobs.copied, layout, HOSTS, **options)
    came = [result["came"] for result in found]
    assert max(came) <= 1.1 * min(came), "without copies one rank of two gets all"
    expected = plain
    if "accumulate_grad_batches" in options:
        expected = ranks.call(jobs.train, "dp4", **MIXTURE, **options)[0]
    check(found[0], expected)


def test_on_ranks_that_do_not_have_them(ranks4: RankGroup, plain: dict[str, Any]) -> None:
    """An expert may be computed on other ranks only, and on as many as there are."""
    found = ranks4.call(jobs.copied, "ep4", ((1, 3), (0, 2), (0,), (0, 1)))
    check(found[0], plain)
    assert all(result["came"] for result in found)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (((0, 1), (2, 2, 3)), r"none twice, and each of the 4 on some rank\. Got"),
        (((0, 1), (2,)), "each of the 4 on some rank"),
        (((0, 1, 2, 3),), "for each of the 2 ranks of `ep`"),
    ],
    ids=["twice", "missing", "ranks"],
)
def test_refused(ranks2: RankGroup, hosts: tuple, message: str) -> None:
    with pytest.raises(RankError, match=rf"`expert_hosts` must have.*{message}"):
        ranks2.call(jobs.copied, "ep2", hosts)
