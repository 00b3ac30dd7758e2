"""Batches of a token budget under layouts: gradients by tokens, the budget that fits, a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.callbacks import BatchSizeSchedule
from tests.distributed.tuning import token_jobs as jobs
from tests.harness import RankError, RankGroup
from tests.pairwise import quick, slow

FEATURE = "`TokenBatchSampler`"


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["steps"] == expected["steps"]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("layout", "replicas", "accumulate"),
    [
        ("dp2", 2, 2),
        slow("fsdp2", 2, 3),
        slow("tp2", 1, 3),
        ("pp2", 1, 2),
        slow("fsdp2-pp2", 2, 2),
        slow("dp2-tp2", 2, 1),
        slow("dp2-pp2", 2, 2),
    ],
)
def test_a_step_is_on_the_mean_over_its_tokens(
    request: pytest.FixtureRequest, layout: str, replicas: int, accumulate: int
) -> None:
    ranks = request.getfixturevalue("ranks4" if "-" in layout else "ranks2")
    options: dict[str, Any] = {"shuffle": False, "multiple_of": 2 if "pp" in layout else 1, "max_epochs": 2}
    if "pp" in layout:
        options["strategy_options"] = {"microbatches": 2}
    results = ranks.call(jobs.train, layout, accumulate_grad_batches=accumulate, **options)
    expected = jobs.of_one_process(replicas * accumulate, multiple_of=options["multiple_of"], epochs=2)
    assert len({shape for result in results for shape in result["shapes"]}) > 4, "batches have different shapes"
    close(results[0], expected)


def test_a_mean_over_samples_is_weighted_by_tokens_with_a_warning(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"UserWarning: .*a loss that is not the mean over the tokens of its batch"):
        ranks2.call(jobs.train, "dp2", over="samples", strategy_options={"verify": "start"})


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_accumulation_and_replicas_are_the_same(ranks2: RankGroup, workers: int) -> None:
    """Shuffled, with another order in each epoch."""
    one = ranks2.call(jobs.train, "tp2", accumulate_grad_batches=2, max_epochs=2)[0]
    close(ranks2.call(jobs.train, "dp2", max_epochs=2, workers=workers)[0], one)


@pytest.mark.parametrize("layout", ["dp2", slow("pp2")])
def test_resumed_in_mid_epoch(ranks2: RankGroup, layout: str, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2}
    whole = ranks2.call(jobs.train, layout, save=path, save_at=3, **options)[0]
    resumed = ranks2.call(jobs.train, layout, ckpt_path=path, **options)[0]
    assert resumed["steps"] == whole["steps"]
    assert resumed["shapes"] == whole["shapes"][6:]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight)


@pytest.mark.slow
@pytest.mark.feature("`AdaptiveBatchSize(memory=...)` with a token budget")
@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "tp2", "pp2"])
def test_budget_that_fits_on_all_ranks(ranks2: RankGroup, layout: str) -> None:
    """Rank 1 has room for 200 tokens at once, so under `pp` a batch of two microbatches may have 400."""
    options: dict[str, Any] = {"adaptive": {"memory": "device", "statistics": None}, "fits": {0: 500, 1: 200}}
    if layout == "pp2":
        options |= {"multiple_of": 2, "strategy_options": {"microbatches": 2}}
    results = ranks2.call(jobs.train, layout, **options)
    longest, parts = max(jobs.Sequences().lengths), 2 if layout == "pp2" else 1
    expected = 200 // longest * longest * parts
    for result in results:
        assert result["budgets"] == [expected]
        assert result["budget afterwards"] == 96, "the user's own"
        sizes = [rows * length for rows, length in result["shapes"]]
        assert 0.75 * expected < max(sizes) <= expected


@pytest.mark.slow
def test_budget_is_limited_by_the_batch(ranks2: RankGroup) -> None:
    adaptive = {"memory": "device", "statistics": None, "max_batch_size": 4 * 160}
    budgets = ranks2.call(jobs.train, "dp2", adaptive=adaptive, accumulate_grad_batches=2)[0]["budgets"]
    assert budgets == [160]


def test_budget_is_in_the_checkpoint(ranks2: RankGroup, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    options: dict[str, Any] = {"adaptive": {"memory": "device", "statistics": None}, "max_epochs": 3}
    whole = ranks2.call(jobs.train, "dp2", save=path, save_at=3, fits={0: 300, 1: 200}, **options)[0]
    resumed = ranks2.call(jobs.train, "dp2", ckpt_path=path, fits={0: 900, 1: 900}, **options)[0]
    longest = max(jobs.Sequences().lengths)
    assert whole["budgets"][0] == 200 // longest * longest, "what fits on rank 1"
    assert resumed["budgets"] == whole["budgets"][1:]
    assert resumed["shapes"] == whole["shapes"][3:]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight)


@pytest.mark.slow
def test_memory_that_is_short_halves_the_next_epochs_budget(ranks2: RankGroup) -> None:
    adaptive = {"memory": "device", "statistics": None, "max_batch_size": 320}
    result = ranks2.call(jobs.train, "dp2", adaptive=adaptive, max_epochs=3, short_of_memory_at=(2, 3))[0]
    assert result["budgets"] == [160, 80, 80]


@pytest.mark.feature("`LoadRebalancing(lengths=...)`")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "pp2", "dp2-pp2"], "pp2"))
def test_samples_are_divided_by_their_lengths(request: pytest.FixtureRequest, layout: str) -> None:
    """The loss is the mean over tokens of a batch whose last part is not full; replicas have equally much to do."""
    ranks = request.getfixturevalue("ranks4" if "-" in layout else "ranks2")
    options: dict[str, Any] = {"strategy_options": {"microbatches": 2}} if "pp" in layout else {}
    found = ranks.call(jobs.by_length, layout, True, **options)
    close(found[0], jobs.of_whole_batches(16))
    if layout != "pp2":
        options["strategy_options"] = {"verify": "off"}  # which says that this run is not on the mean over tokens
        in_turn = ranks.call(jobs.by_length, layout, False, **options)
        spread = [
            [max(c) / (sum(c) / len(c)) for c in zip(*(r["tokens"][:7] for r in x), strict=True)]
            for x in (found, in_turn)
        ]
        assert max(spread[0]) < 1.1 < max(spread[1])


@pytest.mark.parametrize("argument", ["statistics", "schedule"])
def test_only_memory_adapts_a_budget(ranks2: RankGroup, argument: str) -> None:
    adaptive: dict[str, Any] = {}
    if argument == "schedule":
        adaptive = {"statistics": None, "schedule": BatchSizeSchedule(points={0: 96, 1000: 192}, unit="tokens")}
    with pytest.raises(RankError, match=f"`{argument}` must be None with batches of a token budget"):
        ranks2.call(jobs.train, "dp2", adaptive=adaptive)
