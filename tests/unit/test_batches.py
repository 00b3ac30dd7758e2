"""Splitting batches of any structure, and looking at a first batch without advancing anything."""

import re
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hybrid.batches import agreed_samples, find_samples, joined_batches, leaves_of, signature, split_batch
from lightning_hybrid.dataloader.agreement import digest
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


class Named(dict):
    """A dictionary with an attribute."""

    def __init__(self, *args: Any, source: str = "") -> None:
        super().__init__(*args)
        self.source = source


class Encoding(UserDict):
    """As the BatchEncoding of transformers: with an object for each sample."""

    def __init__(self, data: Any, encodings: list[Any]) -> None:
        super().__init__(data)
        self.encodings = encodings


class Closed:
    """As a graph: its parts that belong to a sample cannot be known."""

    def __init__(self, *sizes: int) -> None:
        self.tensors = [torch.zeros(size) for size in sizes]


Point = namedtuple("Point", "x y")
N = 4


def rows(*trailing: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(N * int(np.prod(trailing)), dtype=dtype).reshape(N, *trailing)


def boxes(*counts: int) -> list[dict[str, torch.Tensor]]:
    return [{"boxes": torch.zeros(n, 4), "labels": torch.zeros(n, dtype=torch.long)} for n in counts]


SPLIT: dict[str, Any] = {
    "lists of lists": (rows(3), [[1], [1, 2], [], [4]]),
    "targets of detection": {"x": rows(3), "targets": boxes(1, 2, 5, 1)},
    "a tuple of tensors of different length": {"x": rows(3), "words": tuple(torch.zeros(n) for n in (1, 2, 3, 6))},
    "objects for samples": {"x": rows(3), "graphs": tuple(Closed(n) for n in range(N))},
    "two tensors": [rows(3), rows(3)],
    "an array": {"x": rows(3), "weights": np.arange(N)},
    "an object": SimpleNamespace(x=rows(3), y=rows(dtype=torch.long), name="a", scale=2.0),
    "a dict with attributes": Named({"x": rows(3)}, source="web"),
    "a UserDict": Encoding({"x": rows(3)}, [object() for _ in range(N)]),
    "a named tuple": Point(rows(3), rows()),
    "constants": {"x": rows(3), "size": (224, 224), "task": "a", "none": None, "zero": torch.tensor(1.0)},
    "pictures": ([torch.zeros(3, 2 + n, 2) for n in range(N)], boxes(1, 2, 3, 1)),
    "samples": [{"image": torch.zeros(3, 5, 5), "label": n} for n in range(N)],
}
WHOLE: dict[str, tuple[Any, str]] = {
    "different rows": ({"x": rows(3), "edges": torch.zeros(2, 9)}, r"batch\['edges'\]` has 2 rows"),
    "a packed sequence": (
        (rows(3), nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])),
        r"batch\[1\]` is a PackedSequence",
    ),
    "a sparse tensor": ({"x": rows(3), "a": torch.eye(N).to_sparse()}, r"batch\['a'\]` is a sparse tensor"),
    "a graph": ({"x": rows(3), "graph": Closed(7, 9)}, r"batch\['graph'\].tensors\[0\]` has 7 rows"),
    "the number of samples": ({"x": rows(3), "count": N}, r"batch\['count'\]` is 4, which may be the number"),
    "views in one tensor": (torch.zeros(2 * N, 3), "`batch` has 8 rows, and the loader has read 4"),
    "as many tensors as samples": ([rows(3) for _ in range(N)], "`batch` is a list of 4, which may or may not"),
    "an iterator": ((rows(3), iter([])), r"batch\[1\]` is a list_iterator"),
}


@pytest.mark.parametrize("name", SPLIT)
def test_what_belongs_to_samples_is_split_and_the_rest_is_in_every_part(name: str):
    batch = SPLIT[name]
    assert find_samples(batch, N).count == N
    parts = split_batch(batch, 2, N)
    assert all(type(part) is type(batch) for part in parts)
    pieces = [[len(leaf) for leaf in _arrays(part)] for part in parts]
    assert sum(map(sum, pieces)) == sum(len(leaf) for leaf in _arrays(batch))


def _arrays(batch: Any) -> list[Any]:
    return [leaf for _, leaf in leaves_of(batch) if isinstance(leaf, torch.Tensor | np.ndarray) and leaf.ndim]


@pytest.mark.parametrize("name", sorted(SPLIT.keys() - {"pictures"}))
def test_parts_are_joined_to_the_batch(name: str):
    batch = SPLIT[name]
    parts = N if name == "constants" else 2  # of two samples, a pair of constants may be one for each
    joined = joined_batches(split_batch(batch, parts, N), N // parts)
    assert type(joined) is type(batch)
    assert [path for path, _ in leaves_of(joined)] == [path for path, _ in leaves_of(batch)]
    for mine, others in zip(_arrays(joined), _arrays(batch), strict=True):
        assert np.array_equal(mine, others)


def test_batches_that_cannot_be_joined():
    x = rows(3)
    for others, why in (
        ({"x": rows(2), "scale": 1}, "samples of other shapes"),
        ({"x": x, "scale": 2}, "other values that belong to no sample"),
        (Named({"x": x, "scale": 1}), "values of other classes"),
    ):
        with pytest.raises(ValueError, match=why):
            joined_batches([{"x": x, "scale": 1}, others])


def test_parts_keep_classes_attributes_and_constants():
    part = split_batch(SPLIT["a dict with attributes"], 2, N)[1]
    assert (type(part), part.source, part["x"].shape) == (Named, "web", (2, 3))
    encoding = split_batch(SPLIT["a UserDict"], 2, N)[1]
    assert encoding.encodings == SPLIT["a UserDict"].encodings[2:]
    assert len(SPLIT["a UserDict"].encodings) == len(SPLIT["a UserDict"]["x"]) == N
    constants = split_batch(SPLIT["constants"], 4, N)[3]
    assert (constants["size"], constants["task"], constants["none"]) == ((224, 224), "a", None)
    assert split_batch(SPLIT["targets of detection"], 2, N)[1]["targets"][0]["boxes"].shape == (5, 4)
    assert split_batch(SPLIT["lists of lists"], 2, N)[0][1] == [[1], [1, 2]]


@pytest.mark.parametrize("name", WHOLE)
def test_a_batch_with_a_value_that_may_belong_to_samples_is_not_split(name: str):
    batch, obstacle = WHOLE[name]
    found = find_samples(batch, N)
    assert found.count is None
    assert re.search(obstacle, found.obstacle), found.obstacle
    assert split_batch(batch, 1, N) == [batch]


def test_without_the_number_of_samples_of_the_loader_tensors_outside_lists_tell_it():
    assert find_samples((rows(3), rows(dtype=torch.long))).count == N
    assert find_samples(((rows(3), rows(3)), rows())).count == N
    assert find_samples([torch.zeros(3, 5, 5) for _ in range(8)]).count is None
    assert find_samples(([torch.zeros(3, 5, 5) for _ in range(8)], list(range(8)))).count is None


def test_two_samples_and_two_tensors():
    x, y = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    assert find_samples((x, y), 2).count == 2
    assert split_batch((x, y), 2, 2)[0][0].shape == (1, 5)
    assert find_samples((x, x), 2).count is None
    assert find_samples((x, torch.zeros(5, 5)), 2).count is None


def test_signature_tells_shapes_and_structures_apart():
    a, b = {"x": torch.ones(2, 3)}, {"x": torch.zeros(2, 3)}
    assert signature(a) == signature(b)
    assert signature(a) != signature({"x": torch.ones(2, 4)})
    assert signature(a) != signature({"x": torch.ones(2, 3), "mask": None})
    assert signature(Closed(2, 3)) == signature(Closed(2, 3)) != signature(Closed(2, 4))
    sparse = torch.eye(3).to_sparse()
    assert signature(sparse) == signature(sparse * 2) != signature(torch.ones(3, 3).to_sparse())


def test_signature_with_values_has_those_that_may_decide_what_is_computed():
    def key(task: Any, names: list[str]) -> Any:
        return signature({"task": task, "names": names}, values=True)

    assert key("a", ["p", "q"]) == key("a", ["r", "s"]) != key("b", ["p", "q"])
    assert key(True, []) != key(False, [])


def test_tensors_in_objects_count_where_batches_are_compared():
    first, second = Closed(3), Closed(3)
    second.tensors[0] += 1
    assert digest(first) == digest(Closed(3)) != digest(second)
    assert agreed_samples(first) == 3
    assert agreed_samples(Closed(3, 4)) is None


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
