"""Copies of objects: what has changed, and back to what was."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hybrid.ghosts.objects import Copy


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
def test_a_change_is_seen_and_undone(kind: str) -> None:
    value = STATES[kind]
    before = Copy(value)
    assert Copy(value).same_as(before)
    changed(kind, value)
    assert not Copy(value).same_as(before)
    if kind != "tensor in a tuple":  # tensors are not restored
        assert before.restore() is value
        assert Copy(value).same_as(before)
