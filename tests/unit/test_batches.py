"""Splitting batches of any structure, and looking at a first batch without advancing anything."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hybrid.batches import batch_size, signature, split_batch
from lightning_hybrid.dataloader.peek import first_batch
from lightning_hybrid.spec.errors import PartitionError


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def test_nested_structures_are_split_along_dimension_zero():
    batch = {"x": torch.arange(4), "inner": (torch.ones(4, 2), [torch.zeros(4)]), "names": list("abcd"), "scale": 2.0}
    first, second = split_batch(batch, 2)
    assert first["x"].tolist() == [0, 1]
    assert second["inner"][0].shape == (2, 2)
    assert second["names"] == ["c", "d"]
    assert second["scale"] == 2.0
    parts = split_batch(Pair(torch.arange(4), torch.arange(4)), 4)
    assert [int(p.left) for p in parts] == [0, 1, 2, 3]


def test_tensors_that_disagree_are_refused_unless_the_batch_stays_whole():
    batch = (torch.ones(3, 8), torch.ones(8))
    with pytest.raises(PartitionError, match=r"first dimensions \[3, 8\].*`microbatches=1`"):
        batch_size(batch)
    assert split_batch(batch, 1) == [batch]


def test_signature_tells_shapes_and_structures_apart():
    a, b = {"x": torch.ones(2, 3)}, {"x": torch.zeros(2, 3)}
    assert signature(a) == signature(b)
    assert signature(a) != signature({"x": torch.ones(2, 4)})
    assert signature(a) != signature({"x": torch.ones(2, 3), "mask": None})


def test_a_first_batch_does_not_advance_random_streams():
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=2, shuffle=True)
    torch.manual_seed(0)
    expected = next(iter(loader))
    torch.manual_seed(0)
    first_batch(loader)
    assert torch.equal(next(iter(loader))[0], expected[0])


def test_an_own_generator_is_not_advanced():
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=2, shuffle=True, generator=generator)
    before = generator.get_state()
    first_batch({"a": loader})
    assert torch.equal(generator.get_state(), before)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10))


def test_iterable_data_and_loaders_that_are_no_data_loader():
    assert first_batch(DataLoader(Stream(), batch_size=3)).tolist() == [0, 1, 2]
    assert first_batch([torch.zeros(2)])[0] == 0
    with pytest.raises(PartitionError, match="can be iterated only once"):
        first_batch(iter([1, 2]))
