"""Random numbers drawn while samples are read: the same under any layout, with any number of workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.dataloader import data_jobs, worker_jobs
from tests.harness import RankGroup
from tests.pairwise import quick, slow

CASES: list[Any] = [
    ("dp2", "noise", {}),
    ("fsdp2", "noise", {"num_workers": 2}),
    slow("tp2", "noise", {}),
    ("tp2", "noise", {"num_workers": 1, "persistent_workers": True}),
    ("dp2", "noise in a subset", {"num_workers": 1}),
]


def noise_of(results: list[dict]) -> dict[tuple[int, int], tuple]:
    """By epoch and sample: the three numbers that it came with."""
    found: dict[tuple[int, int], tuple] = {}
    for result in results:
        for number, (indices, values) in enumerate(zip(result["steps"], result["noise"], strict=True)):
            for i, index in enumerate(indices):
                found.setdefault((number // 3, index), tuple(values[3 * i : 3 * i + 3]))
    return found


@pytest.fixture(scope="module")
def expected() -> dict:
    return data_jobs.train("dp1", kind="noise")


@pytest.mark.feature("data: random augmentations in samples, with and without workers")
@pytest.mark.parametrize(("layout", "kind", "options"), CASES)
def test_every_sample_comes_with_the_same_numbers(ranks2: RankGroup, expected, layout, kind, options):
    results = ranks2.call(data_jobs.train, layout, kind=kind, loader_options=options)
    wanted = noise_of([expected])
    assert len(wanted) == 2 * 37
    assert len(set(wanted.values())) == 2 * 37, "no two draws are the same, nor two epochs"
    if options.get("persistent_workers"):  # they draw no seed in the second epoch, so its order is another one
        wanted = {k: v for k, v in wanted.items() if k[0] == 0}
    found = noise_of(results)
    assert {k: found[k] for k in wanted} == wanted
    if layout == "tp2":
        assert results[0]["noise"] == results[1]["noise"]


@pytest.mark.feature("data: random augmentations in samples, with and without workers")
@pytest.mark.parametrize("layout", quick(["dp2", "pp2"], "pp2"))
def test_training_with_them_is_that_of_one_process(ranks2: RankGroup, expected, layout):
    result = ranks2.call(data_jobs.train, layout, kind="noise", loader_options={"num_workers": 2})[0]
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=5e-5, atol=5e-6, msg=name)


def test_a_users_worker_init_fn_runs_and_sees_its_own_dataset(ranks2: RankGroup):
    for kind in ("samples", "stream"):
        for seen in ranks2.call(worker_jobs.what_workers_see, "dp2", kind):
            assert seen == ["WithNoise" if kind == "samples" else "Stream"] * 2


@pytest.mark.parametrize("layout", quick(["tp2", "dp2"], "dp2"))
def test_collating_and_reading_a_batch_at_once(ranks2: RankGroup, layout):
    """`collate_fn` and `__getitems__` draw from seeds that a replica, workers and runs have in common."""
    alone = ranks2.call(worker_jobs.collate_with_noise, layout, 0)
    worked = ranks2.call(worker_jobs.collate_with_noise, layout, 2)
    assert alone == worked
    assert (alone[0] == alone[1]) == (layout == "tp2")


def test_workers_are_seeded_by_replica(ranks2: RankGroup):
    """With `seed_everything(workers=True)` Lightning seeds by rank, and ranks of one replica would differ."""
    first, second = ranks2.call(worker_jobs.noise_of_stream, "tp2")
    assert first == second
    first, second = ranks2.call(worker_jobs.noise_of_stream, "dp2")
    assert first != second


@pytest.mark.slow
def test_workers_may_be_started_anew(ranks2: RankGroup):
    """What travels to a worker can be pickled."""
    assert ranks2.call(worker_jobs.noise_of_stream, "dp2", "spawn") == ranks2.call(worker_jobs.noise_of_stream, "dp2")
