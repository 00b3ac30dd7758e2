"""Iterators can be set back to an earlier item."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid.ghosts.objects import Copy
from lightning_hybrid.ghosts.rewind import Rewindable, is_consumable


def _numbers() -> TensorDataset:
    return TensorDataset(torch.arange(6))


def test_items_come_again() -> None:
    items = Rewindable(k * k for k in range(4))
    assert next(items) == 0
    position = items.position
    assert [next(items), next(items)] == [1, 4]
    items.position = position
    assert list(items) == [1, 4, 9]
    with pytest.raises(StopIteration):
        next(items)


def test_a_copy_restores_iterators_in_containers() -> None:
    state = {"cycle": itertools.cycle("ab"), "loaders": [iter(DataLoader(_numbers()))]}
    copy = Copy(state)
    assert copy.same_as(Copy(state))
    assert (next(state["cycle"]), int(next(state["loaders"][0])[0])) == ("a", 0)
    assert not copy.same_as(Copy(state))
    copy.restore()
    assert (next(state["cycle"]), int(next(state["loaders"][0])[0])) == ("a", 0)


class _Batch:
    """An object of which the garbage collector can be asked."""


def test_a_released_copy_keeps_no_items() -> None:
    state = {"batches": [(_Batch() for _ in range(3))]}
    copy = Copy(state)
    copy.release_items()
    batch = weakref.ref(next(state["batches"][0]))
    next(state["batches"][0])
    assert batch() is None
    assert not copy.same_as(Copy(state))


@pytest.mark.parametrize("value", [(k for k in ()), iter([]), zip([]), map(int, []), itertools.count(), reversed([])])
def test_is_consumable(value: object) -> None:
    assert is_consumable(value)


@pytest.mark.parametrize("value", [[], range(3), "text", DataLoader(_numbers()), Rewindable(iter([]))])
def test_is_not_consumable(value: object) -> None:
    assert not is_consumable(value)
