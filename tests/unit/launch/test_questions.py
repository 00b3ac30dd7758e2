"""Ranks compare what they are about to do through a store."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lightning_hybrid.launch.questions import Difference, Place, Questions
from lightning_hybrid.launch.store import FailureStore

RANKS = (0, 1)


@pytest.fixture
def ranks() -> list[Any]:
    store = HashStore()
    peers = [
        SimpleNamespace(store=FailureStore(store, r), group=SimpleNamespace(rank=r), is_alone=False, progress="")
        for r in RANKS
    ]
    return [(p, Questions(SimpleNamespace(peers=p, cause=None), RANKS, "run", 5.0)) for p in peers]  # type: ignore[arg-type]


def compare(ranks: list[Any], place: Place, *answers: str) -> list[Any]:
    found: list[Any] = [None, None]

    def ask(rank: int) -> None:
        found[rank] = ranks[rank][1].compare(place, answers[rank])

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in RANKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_equal_answers(ranks: list[Any]) -> None:
    for event in range(3):
        assert compare(ranks, Place(1, event), "gathers", "gathers") == [None, None]


def test_different_answers(ranks: list[Any]) -> None:
    found = compare(ranks, Place(1, 0), "gathers", "reduces")
    assert set(found) == {Difference(0, "gathers"), Difference(1, "reduces")}


def test_a_rank_that_has_gone_on(ranks: list[Any]) -> None:
    (peers, questions), (_, asks) = ranks
    questions.at(Place(2, 4))
    peers.store.note_progress(peers.progress)
    assert asks.compare(Place(2, 3), "gathers") == Difference(0, None)


def test_a_rank_that_never_comes(ranks: list[Any]) -> None:
    questions = ranks[1][1]
    questions._patience = 0.4
    assert questions.compare(Place(2, 3), "gathers") == Difference(-1, None)
