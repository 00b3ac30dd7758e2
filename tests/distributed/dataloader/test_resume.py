"""A run that was interrupted goes on with the samples that are left, under any layout, to the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.dataloader import data_jobs, stream_jobs, worker_jobs
from tests.distributed.reference import reference
from tests.harness import RankGroup
from tests.pairwise import slow

EPOCHS = 3
ONE = "dp1"
"""One process, with the strategy: samples with random numbers are the same under every layout."""

# where a checkpoint is saved: hook and global step, of three steps an epoch
MIDDLE, LATER, LAST_BATCH = ("batch", 2), ("batch", 4), ("batch", 3)
EPOCH_END, VALIDATION_END = ("epoch", 3), ("validation", 3)

CASES: list[Any] = [
    slow("shuffled", MIDDLE, "dp2", "dp2", {}),
    slow("shuffled", LATER, "dp2", "tp2", {}),
    ("shuffled", LATER, "pp2", "fsdp2", {}),
    slow("shuffled", LATER, "tp2", "pp2", {}),
    ("shuffled", LATER, "dp2", "dp2", {"accumulate_grad_batches": 2, "save_at": ("batch", 3)}),
    ("shuffled", LAST_BATCH, "dp2", "pp2", {"val_samples": 0}),
    slow("shuffled", EPOCH_END, "fsdp2", "dp2", {}),
    ("shuffled", VALIDATION_END, "dp2", "dp2", {"val_check_interval": 1.0}),
    ("own generator", LATER, "dp2", "fsdp2", {}),
    slow("own generator", VALIDATION_END, "dp2", "dp2", {}),
    slow("own sampler", LATER, "dp2", "dp2", {}),
    ("own sampler", EPOCH_END, "tp2", "dp2", {}),
    ("given batches", LATER, "tp2", "dp2", {}),
    slow("noise", LATER, "dp2", "pp2", {}),
    ("noise", LATER, "fsdp2", "dp2", {"loader_options": {"num_workers": 2}}),
    slow("noise", EPOCH_END, "dp2", "dp2", {"loader_options": {"num_workers": 1, "persistent_workers": True}}),
]


def _same(result: dict, expected: dict) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=5e-5, atol=5e-6, msg=name)


@pytest.mark.feature("data: resuming within an epoch, saved under another layout")
@pytest.mark.parametrize(("kind", "place", "saved", "layout", "options"), CASES)
def test_goes_on(ranks2: RankGroup, tmp_path, kind, place, saved, layout, options):
    options = {"kind": kind, "max_epochs": EPOCHS, **options}
    place = options.pop("save_at", place)
    expected = reference(data_jobs.train, ONE, **options)
    path = data_jobs.file_of(tmp_path, "one.ckpt")
    ranks2.call(data_jobs.train, saved, save=(path, *place), **options)
    results = ranks2.call(data_jobs.train, layout, ckpt_path=path, **options)
    _same(results[0], expected)
    seen = [sum(len(step) for step in result["steps"]) for result in (results[0], expected)]
    assert seen[0] < seen[1], "what was trained on is not trained on again"


def test_training_is_that_of_lightning_without_the_strategy(ranks2: RankGroup):
    """With nothing random in a sample, the reference of the other tests is what Lightning does by itself."""
    _same(
        ranks2.call(data_jobs.train, "dp2", max_epochs=EPOCHS)[0], reference(data_jobs.train, None, max_epochs=EPOCHS)
    )


@pytest.mark.feature("data: a Lightning checkpoint saved within an epoch")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning")
@pytest.mark.parametrize("kind", [slow("in order"), "shuffled"])
@pytest.mark.parametrize("layout", ["dp2", slow("tp2"), slow("pp2")])
def test_a_checkpoint_of_lightning_in_mid_epoch_goes_on_as_in_lightning(ranks2: RankGroup, tmp_path, layout, kind):
    """It has no place in the data: Lightning makes the steps that are left with the beginning of a new order."""
    path = data_jobs.file_of(tmp_path, "plain.ckpt")
    data_jobs.train(None, kind=kind, save=(path, *MIDDLE), max_epochs=2)
    expected = data_jobs.train(None, kind=kind, ckpt_path=path, max_epochs=2)
    assert len(expected["steps"]) == 4
    _same(ranks2.call(data_jobs.train, layout, kind=kind, ckpt_path=path, max_epochs=2)[0], expected)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_global_batch_skips_exactly_what_was_used(ranks2: RankGroup, tmp_path, before, after):
    """Batches of 16 and of 8: two steps, then the rest of the epoch and a whole one."""
    path = data_jobs.file_of(tmp_path, "one.ckpt")
    first = ranks2.call(
        data_jobs.train, "dp2", samples=64, save=(path, "batch", 2), max_epochs=1, global_batch_factor=before
    )
    used = {i for result in first for step in result["steps"][:2] for i in step}
    results = ranks2.call(data_jobs.train, "dp2", samples=64, ckpt_path=path, global_batch_factor=after)
    size, whole = 8 // after, 64 // (16 // after)
    rest = (64 - len(used)) // (2 * size)
    assert len(used) == 2 * 16 // before
    assert [len(result["steps"]) for result in results] == [rest + whole] * 2
    seen = [
        [i for result in results for step in result["steps"][part] for i in step]
        for part in (slice(rest), slice(rest, None))
    ]
    assert sorted(seen[0]) == sorted(set(range(64)) - used)
    assert sorted(seen[1]) == list(range(64))
    assert "val" in results[0]["metrics"]


@pytest.mark.parametrize("kind", [slow("plain"), "noisy", "resuming"])
def test_a_stream_goes_on(ranks2: RankGroup, tmp_path, kind):
    path = data_jobs.file_of(tmp_path, "one.ckpt")
    expected = ranks2.call(stream_jobs.train_on_stream, "dp2", kind)
    ranks2.call(stream_jobs.train_on_stream, "dp2", kind, save=(path, "batch", 2))
    results = ranks2.call(stream_jobs.train_on_stream, "dp2", kind, ckpt_path=path)
    for result, wanted in zip(results, expected, strict=True):
        _same(results[0], expected[0])
        assert result["steps"] == wanted["steps"][2:]
        assert result["noise"] == wanted["noise"][2:]
    if kind == "resuming":
        assert results[0]["read"] < expected[0]["read"] - 16, "the dataset itself goes on, nothing is read twice"


def test_a_loader_that_keeps_its_own_place(ranks2: RankGroup, tmp_path):
    path = data_jobs.file_of(tmp_path, "one.ckpt")
    ranks2.call(worker_jobs.train_on_own_loader, "dp2", save=(path, "batch", 1))
    for steps, loaded in ranks2.call(worker_jobs.train_on_own_loader, "dp2", ckpt_path=path):
        assert loaded == {"at": 2}
        assert len(steps) == 1
