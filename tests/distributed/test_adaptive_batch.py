"""`AdaptiveBatchSize` under layouts: the statistics, every switch, and a resumed run, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import adaptive_jobs as jobs
from tests.harness import RankError, RankGroup

pytestmark = pytest.mark.distributed

FEATURE = "`AdaptiveBatchSize`"


def group_of(request: pytest.FixtureRequest, layout: str) -> RankGroup:
    return request.getfixturevalue("ranks4" if "-" in layout else "ranks2")


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("layout", "replicas", "schedule", "microbatches"),
    [
        ("dp2", 2, "1F1B", 1),
        ("fsdp2", 2, "1F1B", 1),
        ("tp2", 1, "1F1B", 1),
        ("pp2", 1, "1F1B", 4),
        ("pp2", 1, "GPipe", 4),
        ("pp2", 1, "Interleaved1F1B", 4),
        ("pp2", 1, "ZBVZeroBubble", 4),
        ("pp2", 1, "DualPipeV", 4),
        ("fsdp2-pp2", 2, "1F1B", 2),
        pytest.param("dp2-tp2", 2, "1F1B", 1, marks=pytest.mark.slow),
        pytest.param("tp2-pp2", 1, "1F1B", 4, marks=pytest.mark.slow),
    ],
)
def test_noise_equals_that_of_single_parts(
    request: pytest.FixtureRequest, layout: str, replicas: int, schedule: str, microbatches: int
) -> None:
    options = {"strategy_options": {"schedule": schedule, "microbatches": microbatches}}
    results = group_of(request, layout).call(jobs.noise, layout, **options)
    expected = jobs.noise_of_parts(replicas, microbatches)
    for result in results:
        assert result["parts"] == [[2 * replicas * microbatches]] * 3
        torch.testing.assert_close(torch.tensor(result["found"]), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(("layout", "replicas", "group"), [("ep2", 2, 2), ("fsdp2-ep2", 4, 2)])
def test_noise_with_divided_experts(request: pytest.FixtureRequest, layout: str, replicas: int, group: int) -> None:
    results = group_of(request, layout).call(jobs.noise, layout, "Mixture")
    expected = jobs.noise_of_parts(replicas, 1, "Mixture", group=group)
    assert results[0]["parts"] == [[2 * replicas, 2 * replicas // group]] * 3
    for result in results:
        torch.testing.assert_close(torch.tensor(result["found"]), torch.tensor(expected), rtol=1e-5, atol=0)


def check_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["gradients"]) == len(expected["gradients"])
    for step, (own, one) in enumerate(zip(found["gradients"], expected["gradients"], strict=True)):
        for name, norm in one.items():
            assert float(own[name]) == pytest.approx(float(norm), rel=1e-5), (step, name)
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("layout", "batch", "microbatches"),
    [("dp2", 2, 1), ("pp2", 4, 2), ("fsdp2", 2, 1), pytest.param("fsdp2-pp2", 2, 2, marks=pytest.mark.slow)],
)
def test_every_change_of_accumulation(
    request: pytest.FixtureRequest, layout: str, batch: int, microbatches: int
) -> None:
    walk = jobs.every_transition(8)
    divisions = [(batch, batches, microbatches) for batches in walk]
    results = group_of(request, layout).call(jobs.planned, layout, divisions, 4 * sum(walk))
    check_steps(results[0], jobs.of_one_process([4 * batches for batches in walk], 4 * sum(walk)))


@pytest.mark.parametrize("workers", [0, 2, -2], ids=["no workers", "workers", "workers that persist"])
@pytest.mark.parametrize("layout", ["dp2", "fsdp2"])
def test_loader_of_other_batches(ranks2: RankGroup, layout: str, workers: int) -> None:
    divisions = [(2, 1, 1), (4, 2, 1), (1, 3, 1), (8, 1, 1), (2, 2, 1), (6, 1, 1)]
    steps = [2 * batch * batches for batch, batches, _ in divisions]
    samples = sum(steps) + 5
    loader_options: dict[str, Any] = {}
    if workers:
        loader_options = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": workers < 0}
    results = ranks2.call(jobs.planned, layout, divisions, samples, loader_options=loader_options)
    check_steps(results[0], jobs.of_one_process(steps, samples))


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_pipeline_of_other_microbatches(ranks2: RankGroup, schedule: str) -> None:
    divisions = [(4, 1, 2), (8, 1, 4), (4, 3, 1), (8, 2, 2), (16, 1, 8), (2, 1, 1)]
    steps = [batch * batches for batch, batches, _ in divisions]
    options = {"strategy_options": {"schedule": schedule, "microbatches": 2}}
    results = ranks2.call(jobs.planned, "pp2", divisions, sum(steps) + 1, **options)
    check_steps(results[0], jobs.of_one_process(steps, sum(steps) + 1))
