"""Which elements go where, checked on random divisions: every part is filled, and nothing is sent in vain."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from lightning_hybrid.reshard.transfer import transfers
from lightning_hybrid.spec.tensor_index import Index, overlaps, runs_of, whole_index


def elements(index: Index) -> set[tuple[int, ...]]:
    return set(itertools.product(*([i for start, stop in runs for i in range(start, stop)] for runs in index)))


def random_parts(rng: random.Random, shape: tuple[int, ...], ranks: int) -> list[Index | None]:
    """Divided over some of the ranks along one dim, in a permuted order half of the time; the others have copies."""
    dim, parts = rng.randrange(len(shape)), rng.choice([1, 2, 3])
    order = list(range(shape[dim]))
    if rng.random() < 0.5:
        rng.shuffle(order)
    pieces = [p.tolist() for p in np.array_split(np.array(order), parts)]
    found: list[Index | None] = []
    for rank in range(ranks):
        index = list(whole_index(shape))
        index[dim] = runs_of(pieces[rank % parts])
        found.append(tuple(index) if rank < parts or rng.random() < 0.6 else None)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_every_part_is_filled_and_nothing_sent_in_vain(seed: int) -> None:
    rng = random.Random(seed)
    shape = rng.choice([(6,), (4, 6), (5, 3), (2, 3, 4)])
    old, new = random_parts(rng, shape, 5), random_parts(rng, shape, 5)
    steps = transfers(tuple(old), tuple(new))
    for rank, wanted in enumerate(new):
        got = [e for s in steps if s.target == rank for e in elements(s.box)]
        assert len(got) == len(set(got)), "no element comes twice"
        assert set(got) == (elements(wanted) if wanted is not None else set())
    for step in steps:
        source = old[step.source]
        assert source is not None
        assert elements(step.box) <= elements(source)
        assert step.count == len(elements(step.box))
        for part in (source, new[step.target]):
            assert part is not None
            assert len(list(overlaps(part, step.box))) == 1, "a view of the part"
    moved = sum(s.count for s in steps if s.source != s.target)
    least = 0
    for rank, wanted in enumerate(new):
        present = old[rank]
        if wanted is not None:
            least += len(elements(wanted) - (elements(present) if present is not None else set()))
    assert moved == least


def test_senders_take_turns() -> None:
    whole = whole_index((4, 4))
    steps = transfers((whole, whole, None, None), (whole, whole, whole, whole))
    assert {(s.source, s.target) for s in steps if s.source != s.target} == {(1, 2), (0, 3)}


def test_scalars_and_empty_parts() -> None:
    assert [(s.source, s.target) for s in transfers(((), None), ((), ()))] == [(0, 0), (0, 1)]
    assert transfers((None, None), (None, None)) == ()
    rows: Index = (((0, 2),),)
    empty: Index = ((),)
    assert [(s.source, s.target) for s in transfers((rows, None), (empty, rows))] == [(0, 1)]


def test_what_is_nowhere() -> None:
    with pytest.raises(ValueError, match="which no rank has"):
        transfers(((((0, 2),),),), ((((0, 4),),),))
