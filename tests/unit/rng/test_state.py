"""The RNG state: restored whatever happens in between, and read from its plain form in checkpoints."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from lightning_hybrid.dataloader.order import Order
from lightning_hybrid.rng.state import RNGState, preserved_rng, seed_all


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def fail(generator: torch.Generator) -> None:
    """As a loader whose workers cannot start: it has drawn their seed before."""
    torch.rand(3, generator=generator)
    raise KeyError


def plain_of_an_older_checkpoint() -> dict:
    """The plain form as 0.1 wrote it."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(key).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "base_seed": 7,
    }


def test_a_state_is_restored_from_its_plain_form():
    with preserved_rng():
        seed_all(5)
        np.random.randn()  # NumPy keeps the second of two normal numbers
        state, older = RNGState.capture(), plain_of_an_older_checkpoint()
        numbers = draw()
        assert not state.equals(RNGState.capture())
        for plain in (state.plain(), older):
            RNGState.from_plain(plain).restore()
            assert RNGState.capture().equals(state)
            assert draw() == numbers


def test_generators_are_restored_after_an_error():
    state = RNGState.capture()
    with pytest.raises(KeyError), preserved_rng():
        fail(torch.default_generator)
    assert RNGState.capture().equals(state)


def test_a_loaders_generators_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    generator = torch.Generator().manual_seed(3)
    sampler = RandomSampler(range(8), generator=generator)
    order, state = Order(sampler), generator.get_state()
    order.agree(DataLoader(range(8), sampler=sampler))  # type: ignore[arg-type]
    with pytest.raises(KeyError), order.preserved_generators():
        fail(generator)
    assert torch.equal(generator.get_state(), state)
