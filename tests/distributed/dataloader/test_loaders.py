"""Loaders beyond one plain DataLoader: without a batch, several together, without a length, given again."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset, random_split

from tests.distributed.dataloader import data_jobs, loader_jobs
from tests.distributed.jobs import Classifier, quiet, trainer_for
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import quick, slow

TWO = ["dp2", "fsdp2", "tp2", "pp2"]

KINDS = ["samples", "dropped", "stream", "batches"]
SLOW = [(x, k) for x in ("tp2", "pp2") for k in KINDS if (x, k) not in [("tp2", "samples"), ("pp2", "dropped")]]


def assert_trained(result: dict, expected: dict) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=2e-5, atol=2e-6, msg=name)
    assert set(result["metrics"]) == set(expected["metrics"])
    for key, value in expected["metrics"].items():
        assert result["metrics"][key] == pytest.approx(value, rel=2e-5), key


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *(("dp2", kind) for kind in KINDS),
        ("tp2", "samples"),
        ("pp2", "dropped"),
        *(slow(layout, kind) for layout, kind in SLOW),
    ],
)
def test_without_a_batch_nothing_is_trained(ranks2: RankGroup, layout, kind):
    """As in one process; a plan of `tp` or `pp` needs a batch, and says so."""
    if layout != "dp2":
        with pytest.raises(RankError, match=r"PartitionError: .*planned with the first batch, but the data has none"):
            ranks2.call(loader_jobs.train_on_nothing, layout, kind)
        return
    expected = reference(loader_jobs.train_on_nothing, None, kind)
    assert expected["steps"] == []
    for rank, result in enumerate(ranks2.call(loader_jobs.train_on_nothing, layout, kind)):
        assert result["steps"] == []
        assert result["metrics"] == expected["metrics"]
        for name, value in expected["weights"].items() if rank == 0 else ():
            assert torch.equal(result["weights"][name], value)


@pytest.mark.feature("data: an empty validation dataset")
@pytest.mark.parametrize("layout", quick(TWO, "pp2"))
def test_an_empty_validation_dataset(ranks2: RankGroup, layout):
    expected = reference(loader_jobs.train_without_validation_data, None)
    assert_trained(ranks2.call(loader_jobs.train_without_validation_data, layout)[0], expected)
    named = layout in ("fsdp2", "pp2")
    logged = reference(loader_jobs.validate_beside_nothing, None, named)
    assert logged
    for found in ranks2.call(loader_jobs.validate_beside_nothing, layout, named):
        assert found == pytest.approx(logged, rel=2e-5)


@pytest.mark.feature("data: several training loaders")
@pytest.mark.parametrize("mode", [None, slow("min_size")])
@pytest.mark.parametrize("layout", quick(TWO, "dp2", "pp2"))
def test_several_loaders(ranks2: RankGroup, layout, mode):
    """The loss is a mean over the samples of both, the last batches are uneven.

    A pipeline splits all of a batch alike, so its loaders have batches of one size.
    """
    counts = (37, 37 if layout == "pp2" else 21)
    expected = reference(loader_jobs.train_on_several, None, mode, counts)
    results = ranks2.call(loader_jobs.train_on_several, layout, mode, counts)
    assert_trained(results[0], expected)
    warned = any("Several training loaders are read together" in text for text in results[0]["warned"])
    assert warned == (layout in ("dp2", "fsdp2"))


def test_several_loaders_with_batches_of_unknown_size(ranks2: RankGroup):
    with pytest.raises(RankError, match=r"PartitionError: .*cannot be weighted"):
        ranks2.call(loader_jobs.train_on_several, "dp2", "min_size", (37, 40), own_batches=True)


@pytest.mark.parametrize(("saved", "resumed"), [slow("dp2", "pp2"), ("tp2", "fsdp2")])
def test_several_loaders_go_on(ranks2: RankGroup, tmp_path, saved, resumed):
    path = data_jobs.file_of(tmp_path, "one.ckpt")
    options: dict[str, Any] = {"shuffle": True}
    job, counts = loader_jobs.train_on_several, (37, 37)
    expected = ranks2.call(job, "dp2", None, counts, **options)[0]
    ranks2.call(job, saved, None, counts, save=(path, "batch", 7), **options)
    result = ranks2.call(job, resumed, None, counts, ckpt_path=path, **options)[0]
    assert sum(map(len, result["steps"])) < sum(map(len, expected["steps"]))
    assert_trained(result, {**expected, "metrics": result["metrics"]})


@pytest.mark.parametrize("layout", quick(TWO, "dp2"))
def test_loaders_that_lightning_has_returned_are_not_sharded_twice(ranks2: RankGroup, layout):
    logged, counts = reference(loader_jobs.read_again, None)
    assert counts == [3, 5, 2 * 5]
    for values, found in ranks2.call(loader_jobs.read_again, layout):
        assert found == counts
        assert values == pytest.approx(logged, rel=2e-5)


@pytest.mark.parametrize("layout", quick(TWO, "dp2"))
def test_a_combined_loader_is_fitted_on_twice(ranks2: RankGroup, layout):
    expected = reference(loader_jobs.train_on_several, None, "max_size_cycle", (37, 37), fits=2)
    results = ranks2.call(loader_jobs.train_on_several, layout, "max_size_cycle", (37, 37), fits=2)
    assert_trained(results[0], expected)


@pytest.mark.parametrize("layout", ["tp2", *map(slow, ("dp2", "fsdp2"))])
def test_a_step_that_takes_an_iterator(ranks2: RankGroup, layout):
    """It is not known which batch it trains on, so an uneven one cannot be weighted."""
    expected = reference(loader_jobs.train_by_iterator, None, 32)
    assert_trained(ranks2.call(loader_jobs.train_by_iterator, layout, 32)[0], expected)
    if layout == "tp2":
        return
    with pytest.raises(RankError, match=r"PartitionError: .*`dataloader_iter`.*different numbers of samples, \(1, 0\)"):
        ranks2.call(loader_jobs.train_by_iterator, layout, 33)


def test_microbatches_are_not_taken_from_an_iterator(ranks2: RankGroup):
    with pytest.raises(RankError, match=r"PartitionError: .*pp=2.*loader_jobs.py:\d+ .*takes an iterator"):
        ranks2.call(loader_jobs.train_by_iterator, "pp2", 32)


@pytest.mark.feature("data: a sampler without a length")
@pytest.mark.parametrize("layout", quick(TWO, "pp2"))
def test_a_sampler_without_a_length(ranks2: RankGroup, tmp_path, layout):
    expected = reference(loader_jobs.train_without_end, None, True)
    path = data_jobs.file_of(tmp_path, "one.ckpt")
    results = ranks2.call(loader_jobs.train_without_end, layout, True, save=(path, "batch", 7))
    assert_trained(results[0], expected)
    resumed = ranks2.call(loader_jobs.train_without_end, "dp2", True, ckpt_path=path)[0]
    assert len(resumed["steps"]) == 3
    assert_trained(resumed, {**expected, "metrics": resumed["metrics"]})


def test_an_order_from_the_global_stream_without_a_length_does_not_go_on(ranks2: RankGroup, tmp_path):
    job = loader_jobs.train_without_end
    path = data_jobs.file_of(tmp_path, "one.ckpt")
    assert_trained(ranks2.call(job, "dp2", False, save=(path, "batch", 7))[0], job(None, False))
    with pytest.raises(RankError, match=r"ValueError: The sampler Endless has no length.*its own `torch.Generator`"):
        ranks2.call(job, "dp2", False, ckpt_path=path)


@pytest.mark.feature("data: batches of any size")
@pytest.mark.parametrize("layout", ["dp2", "fsdp2"])
def test_batches_of_any_size(ranks2: RankGroup, layout):
    sizes = (5, 3, 4, 4, 2, 7, 6)
    expected = reference(loader_jobs.train_on_batches_of_any_size, None, sizes)
    results = ranks2.call(loader_jobs.train_on_batches_of_any_size, layout, sizes)
    assert_trained(results[0], expected)
    assert [len(step) for step in results[0]["steps"][:4]] == [5, 4, 2, 6]
    assert [len(step) for step in results[1]["steps"][:3]] == [3, 4, 7]


class Drawn(Dataset):
    """Samples that the process has drawn itself."""

    def __init__(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        self.x, self.y = torch.randn(16, 16, generator=generator), torch.randint(0, 4, (16,), generator=generator)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "y": self.y[index]}

    def __len__(self) -> int:
        return len(self.x)


def fit_own_data(layout: str, kind: str, differs: bool) -> None:
    """Trains on data that differ between ranks, as without a seed."""
    quiet()
    rank = int(os.environ["RANK"]) if differs else 0
    data: Any = Drawn(rank)
    if kind == "split":
        data = random_split(Drawn(0), [12, 4], torch.Generator().manual_seed(rank))[0]
    if kind == "tensors":
        data = ConcatDataset([TensorDataset(data.x, data.y)])
    trainer, replicas = trainer_for(layout, max_steps=1)
    loader = DataLoader(data, batch_size=4 // replicas)
    trainer.fit(OnPairs() if kind == "tensors" else Classifier(), loader)


class OnPairs(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step({"x": batch[0], "y": batch[1]}, batch_idx)


@pytest.mark.parametrize(
    ("layout", "kind", "message"),
    [
        ("dp2", "split", r"ranks 0 and 1 have different datasets \(Subset\).*seed_everything"),
        ("fsdp2", "tensors", r"ranks 0 and 1 have different datasets \(ConcatDataset\).*seed_everything"),
        (
            "tp2",
            "samples",
            "ranks 0, 1 of one replica must read the same data.*different first batches.*seed_everything",
        ),
        (
            "pp2",
            "samples",
            "ranks 0, 1 of one replica must read the same data.*different first batches.*seed_everything",
        ),
    ],
)
def test_data_that_differ_between_ranks_are_refused(ranks2: RankGroup, layout: str, kind: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        ranks2.call(fit_own_data, layout, kind, differs=True)
    ranks2.call(fit_own_data, layout, kind, differs=False)
