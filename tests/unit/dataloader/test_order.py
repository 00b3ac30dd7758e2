"""The order of a sampler: drawing it ahead leaves its generators as they were, whatever raises."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from lightning_hybrid.dataloader.order import Order


def test_generators_after_an_error_in_the_users_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(list(range(8)), sampler=RandomSampler(range(8), generator=generator))  # type: ignore[arg-type]
    order = Order(loader.sampler)
    monkeypatch.setattr("lightning_hybrid.dataloader.order.agree", lambda generators: None)
    order.agree(loader)
    before = generator.get_state()

    def draw() -> None:
        torch.rand(3, generator=generator)
        raise KeyError("the user's sampler")

    with pytest.raises(KeyError), order.preserved_generators():
        draw()
    assert torch.equal(generator.get_state(), before)
