"""When a phase of training ends."""

from __future__ import annotations

import math

import pytest

from lightning_hybrid.adapt.phases import Phase, PhaseState, Plateau, check_phases


def test_the_first_point_that_is_reached_begins_a_phase() -> None:
    following = Phase(at_step=10, at_samples=640, at_tokens=10_000)
    assert not PhaseState(samples=639, tokens=9_999).ends(following, 9)
    assert PhaseState(samples=639, tokens=9_999).ends(following, 10)
    assert PhaseState(samples=640).ends(following, 3)
    assert PhaseState().after_step(64, 10_000).ends(following, 1)


def test_a_plateau() -> None:
    plateau = Plateau(metric="loss", patience=2, min_change=0.1)
    following, state = Phase(at_plateau=plateau), PhaseState()
    looks = []
    for value in (4.0, 3.0, 2.8, 2.0, 1.9, 1.85, 1.0):
        state = state.seen(value, plateau)
        looks.append(state.looks)
        if state.ends(following, 0):
            break
    assert looks == [0, 0, 1, 0, 1, 2], "3.0 -> 2.8 is no tenth; 2.0 -> 1.85 neither"
    assert state.next() == PhaseState(phase=1, best=math.inf)
    assert PhaseState(best=-2.0).seen(-2.3, plateau).looks == 0
    assert PhaseState(best=-2.0).seen(-2.1, plateau).looks == 1
    assert PhaseState().seen(math.nan, plateau).looks == 1


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "at least one phase"),
        ([Phase(at_step=3)], "the first phase begins with the training"),
        ([Phase(), Phase(layout="dp2")], "phase 1 must say when it begins"),
        ([Phase(), Phase(at_step=9), Phase(at_step=9)], "one after the other. Got `at_step` at \\[9, 9\\]"),
    ],
)
def test_refused(phases: list[Phase], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_phases(phases)


def test_values_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        Phase(batch_size=0)
    with pytest.raises(ValueError, match="`sequence_length` must be at least 0"):
        Phase(sequence_length=-1)
    with pytest.raises(ValueError, match="`patience` must be at least 1"):
        Plateau(metric="loss", patience=0)
    with pytest.raises(ValueError, match="`min_change` must be between 0 and 1"):
        Plateau(metric="loss", min_change=1.0)
