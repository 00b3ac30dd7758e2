"""Which blocks are gathered by themselves."""

from __future__ import annotations

import pytest

from lightning_hybrid.replicas.calls import StepCalls, alike_on_all, different_units

BLOCKS = ["a.0", "a.1", "a.2", "heads.0", "heads.1"]
CLASSES = dict.fromkeys(BLOCKS[:3], "Block") | dict.fromkeys(BLOCKS[3:], "Linear")


def calls(*names: str, **options: object) -> StepCalls:
    return StepCalls(runs=(names,), **options)  # type: ignore[arg-type]


def test_blocks_called_alike_are_kept() -> None:
    both = [calls("a.0", "a.1", "a.2", "heads.0"), calls("a.0", "a.1", "a.2", "heads.1")]
    assert alike_on_all(both, BLOCKS, CLASSES) == BLOCKS[:3]


def test_a_stack_with_a_block_that_is_not_called_is_excluded() -> None:
    assert alike_on_all([calls("a.0", "a.1", "heads.0", "heads.1")] * 2, BLOCKS, CLASSES) == BLOCKS[3:]


def test_blocks_whose_weights_are_read_outside_are_excluded() -> None:
    found = [calls(*BLOCKS), calls(*BLOCKS, read_outside=frozenset({"heads.0"}))]
    assert alike_on_all(found, BLOCKS, CLASSES) == BLOCKS[:3]


def test_a_dry_run_that_has_failed_excludes_all() -> None:
    assert alike_on_all([calls(*BLOCKS), StepCalls(problem="error")], BLOCKS, CLASSES) == []


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (["ab", "ab"], ""),
        (["abc", "ac"], "b"),
        (["aab", "ab"], "a"),
        (["abc", "bac"], "ab"),
        (["abcd", "acbd"], "bc"),
    ],
)
def test_units_without_which_all_orders_are_equal(runs: list[str], expected: str) -> None:
    assert different_units([list(run) for run in runs]) == set(expected)
