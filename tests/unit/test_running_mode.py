"""Modes of torch that end in another order than they began."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hybrid._torch_private import running_mode


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Operators, Functions])
def test_a_mode_that_begins_within_outlives_it_and_may_end_within_another(kind: Any) -> None:
    ours, users = kind(), kind()
    x = torch.ones(2)
    with running_mode(ours):
        users.__enter__()
        torch.add(x, 1)
    assert (ours.seen, users.seen) == (1, 1)
    torch.add(x, 1)
    assert (ours.seen, users.seen) == (1, 2)
    later = kind()
    with running_mode(later):
        torch.add(x, 1)
        users.__exit__(None, None, None)
    torch.add(x, 1)
    assert (ours.seen, users.seen, later.seen) == (1, 3, 1)
