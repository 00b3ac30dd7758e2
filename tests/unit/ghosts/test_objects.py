"""Copies of objects: what has changed, back to what was, and the change made again elsewhere."""

from __future__ import annotations

import copy
import pickle
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hybrid.ghosts.objects import Copy, apply_difference, difference


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


def changed(kind: str, value: Any) -> None:
    """Changes something in `value`."""
    {
        "list": lambda: value.append(torch.ones(2)),
        "long list": lambda: value.append(1),
        "item of a list": lambda: value[0].append(1),
        "dict": lambda: value["losses"].append(2.0),
        "deque": lambda: value.extend([5, 6]),
        "set": lambda: value.add(2),
        "tensor in a tuple": lambda: value[1].add_(1),
        "array": lambda: value.__setitem__(1, 4.0),
        "generator": lambda: torch.rand(3, generator=value),
        "random": lambda: value.random(),
        "object": lambda: value.inner.append(3),
        "slots": lambda: setattr(value, "count", value.count + 1),
    }[kind]()


STATES = {
    "list": [torch.zeros(2)],
    "long list": list(range(5000)),
    "item of a list": [[], [1]],
    "dict": {"losses": [1.0], "nan": float("nan")},
    "deque": deque([1, 2], 3),
    "set": {1},
    "tensor in a tuple": (1, torch.zeros(2)),
    "array": np.zeros(3),
    "generator": torch.Generator(),
    "random": random.Random(3),
    "object": SimpleNamespace(inner=[1]),
    "slots": Slotted(),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_change_is_seen_undone_and_made_again(kind: str) -> None:
    value = STATES[kind]
    before, tensors = Copy(value), copy.deepcopy(value)
    assert difference(before, value, lambda t: t) is None
    changed(kind, value)
    after = Copy(value)
    change = difference(before, value, torch.Tensor.clone)
    assert change is not None
    change = pickle.loads(pickle.dumps(change))  # as another rank gets it
    expected: Any = str(copy.deepcopy(value)) if kind not in ("generator", "random", "slots") else after.state
    if kind != "tensor in a tuple":  # tensors are not restored
        assert before.restore() is value
        assert Copy(value).same_as(before)
    again = apply_difference(value if kind != "tensor in a tuple" else tensors, change)
    found: Any = Copy(again).state if kind in ("generator", "random", "slots") else str(again)
    assert found == expected if kind != "generator" else torch.equal(found, expected)
