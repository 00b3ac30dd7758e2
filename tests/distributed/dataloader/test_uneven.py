"""BatchWeights numbers of samples: every one counts once, and the step is that of one process on the global batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.distributed.dataloader import data_jobs, worker_jobs
from tests.distributed.reference import reference
from tests.harness import RankGroup
from tests.pairwise import quick, slow

TWO = ["dp2", "fsdp2", "tp2", "pp2"]
FOUR = "fsdp2-pp2"

CASES: dict[str, dict[str, Any]] = {
    "last batch of three and two samples": {"samples": 37},
    "last batch of one and no sample": {"samples": 33, "kind": "in order"},
    "fewer samples than replicas": {"samples": 1, "kind": "in order", "val_samples": 1},
    "drop last": {"samples": 37, "loader_options": {"drop_last": True}},
    "accumulation": {"samples": 37, "accumulate_grad_batches": 2},
    "accumulation, last batch alone": {"samples": 33, "accumulate_grad_batches": 2},
    "clipping": {"samples": 33, "gradient_clip_val": 0.05},
    "manual optimization": {"samples": 33, "manual": True},
    "weighted sampler": {"samples": 37, "kind": "weighted"},
    "subset sampler": {"samples": 74, "kind": "subset"},
    "generator of the loader": {"samples": 37, "kind": "own generator"},
    "sampler with `set_epoch`": {"samples": 37, "kind": "own sampler"},
    "batch sampler of torch": {"samples": 37, "kind": "given batches"},
    "batch norm": {"samples": 37, "module_options": {"norm": True}},
    "limited batches": {"samples": 37, "limit_train_batches": 2, "limit_val_batches": 2},
}

FIRST = [
    "last batch of three and two samples",
    "last batch of one and no sample",
    "fewer samples than replicas",
    "accumulation",
]
"""Cases of the product of axes."""
OFTEN = [
    *(("dp2", case) for case in CASES),
    ("fsdp2", "last batch of one and no sample"),
    ("tp2", "last batch of three and two samples"),
    ("pp2", "accumulation"),
]
"""`dp2` has every case, since axes without replicas share their data; they and shards change what is done with it."""


def assert_like_one_process(results: list[dict], expected: dict, layout: str) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=2e-5, atol=2e-6, msg=name)
    for result in results:
        assert set(result["metrics"]) == set(expected["metrics"])
        for key, value in expected["metrics"].items():
            assert result["metrics"][key] == pytest.approx(value, rel=2e-5, abs=1e-6), key
        # a stage's statistics are on its own rank, here the first
        for name, value in expected["buffers"].items() if result is results[0] or "pp" not in layout else ():
            torch.testing.assert_close(result["buffers"][name], value, rtol=2e-5, atol=2e-6, msg=name)
    if layout in ("dp2", "fsdp2"):
        of_replicas = [results[0]["steps"], results[1]["steps"]]
        for step, wanted in enumerate(expected["steps"]):
            counts = [len(range(r, len(wanted), 2)) for r in range(2)]
            for r, own in enumerate(of_replicas):
                assert own[step][: counts[r]] == wanted[r::2], f"sample i on replica i mod 2, step {step}"
                assert len(own[step]) == max(1, counts[r])


@pytest.mark.feature(by="case", prefix="data: ")
@pytest.mark.parametrize(
    ("layout", "case"),
    quick([p for p in itertools.product(TWO, CASES) if p != ("pp2", "manual optimization")], *OFTEN),
)
def test_two_ranks(ranks2: RankGroup, layout, case):
    assert_like_one_process(
        ranks2.call(data_jobs.train, layout, **CASES[case]), reference(data_jobs.train, None, **CASES[case]), layout
    )


@pytest.mark.feature(by="case", prefix="data: ", layout=FOUR)
@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST)
def test_four_ranks(ranks4: RankGroup, case):
    assert_like_one_process(
        ranks4.call(data_jobs.train, FOUR, **CASES[case]), reference(data_jobs.train, None, **CASES[case]), FOUR
    )


@pytest.mark.parametrize("layout", ["dp4", slow("dp2-fsdp2")])
def test_samples_that_do_not_count_do_not_change_batch_statistics(ranks4: RankGroup, layout):
    options: dict[str, Any] = {"samples": 34, "module_options": {"norm": True}}
    results = ranks4.call(data_jobs.train, layout, **options)
    assert [len(result["steps"][2]) for result in results] == [1, 1, 1, 1], "two of them for nothing"
    assert_like_one_process(results, reference(data_jobs.train, None, **options), layout)


@pytest.mark.feature("data: a custom batch sampler")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "dp2"))
def test_a_batch_sampler_gives_every_replica_a_batch_in_turn(ranks2: RankGroup, layout):
    """A global step is the batches of the replicas, weighed by samples; one process sees them joined."""
    expected = reference(data_jobs.train, None, kind="joined batches")
    results = ranks2.call(data_jobs.train, layout, kind="own batches")
    for name, value in expected["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=2e-5, atol=2e-6, msg=name)
    for key, value in expected["metrics"].items():
        assert results[0]["metrics"][key] == pytest.approx(value, rel=2e-5), key
    for first, second, wanted in zip(results[0]["steps"], results[1]["steps"], expected["steps"], strict=True):
        assert [*first, *second] == wanted or first == second == wanted


def test_a_full_epoch_needs_no_weights(ranks2: RankGroup):
    """Nothing is told to the step while all replicas have equally many samples."""
    results = ranks2.call(data_jobs.train, "dp2", samples=32, val_samples=16)
    expected = reference(data_jobs.train, None, samples=32, val_samples=16)
    assert_like_one_process(results, expected, "dp2")
    assert not any(result["any_uneven"] for result in results)


@pytest.mark.feature("data: sequences padded to the longest of their batch")
@pytest.mark.parametrize("layout", quick(TWO, "pp2"))
def test_lengths_that_change_in_every_step(ranks2: RankGroup, layout):
    """Replicas pad their own samples, and the last batch has another size: stages are planned again for each shape."""
    expected = reference(worker_jobs.train_on_sequences, None)
    for rank, result in enumerate(ranks2.call(worker_jobs.train_on_sequences, layout)):
        assert result["loss"] == pytest.approx(expected["loss"], rel=2e-5)
        for name, value in expected["weights"].items() if rank == 0 else ():
            torch.testing.assert_close(result["weights"][name], value, rtol=5e-5, atol=5e-6, msg=name)


def test_an_empty_dataset_trains_on_nothing(ranks2: RankGroup):
    expected = reference(data_jobs.train, None, samples=0, kind="in order", val_samples=0)
    for result in ranks2.call(data_jobs.train, "dp2", samples=0, kind="in order", val_samples=0):
        assert result["steps"] == expected["steps"] == []
        assert result["metrics"] == expected["metrics"] == {}
