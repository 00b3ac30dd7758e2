"""Values that blocks leave in lists, dictionaries and attributes, and that hooks see, are those of one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.ghosts import left_modules
from tests.distributed.ghosts.test_user_code import compare, fit_class
from tests.harness import RankError, RankGroup

LEFT = "values that blocks leave in lists, dictionaries and attributes"
OBJECTS = "dataclasses and named tuples between blocks"
SEEN = "user code: values of all channels in hooks, attributes, and behind bounds"
WRITTEN = "user code: the step writes into its batch"
FOLLOWS = "user code: the step assigns `parameter.data`"
DECIDES = "user code: values that decide which modules the last stage calls"
SLOW = pytest.mark.slow


def case(kind: str, layout: str, feature: str, *marks: Any) -> Any:
    return pytest.param(kind, layout, marks=[pytest.mark.feature(feature), *marks])


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        case("Auxiliary", "pp2", LEFT),
        case("Routed", "pp2", LEFT),
        case("Keeps", "pp2", LEFT),
        case("Appends", "pp2", LEFT),
        case("Cached", "pp2", LEFT, SLOW),
        case("States", "pp2", OBJECTS),
        case("Names", "pp2", OBJECTS),
        case("States", "tp2", OBJECTS, SLOW),
        case("Names", "tp2", OBJECTS, SLOW),
        case("Auxiliary", "tp2", LEFT, SLOW),
        case("Keeps", "tp2", LEFT, SLOW),
        case("Appends", "tp2", LEFT, SLOW),
        case("WrittenBatch", "pp2", WRITTEN),
        case("WrittenBatch", "tp2", WRITTEN, SLOW),
        case("Follows", "pp2", FOLLOWS),
        case("Adaptive", "pp2", DECIDES),
        case("Adaptive", "tp2", DECIDES, SLOW),
        case("Bounded", "tp2", SEEN),
        case("Different", "tp2", SEEN),
        case("Hooked", "tp2", SEEN),
    ],
)
def test_equals_one_process(ranks2: RankGroup, kind: str, layout: str) -> None:
    compare(ranks2, layout, getattr(left_modules, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auxiliary", "Appends", "Keeps"])
@pytest.mark.feature(LEFT)
def test_equals_one_process_on_four_ranks(ranks4: RankGroup, kind: str) -> None:
    compare(ranks4, "tp2-pp2", getattr(left_modules, kind))


def test_data_of_another_stage_is_not_assigned(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"(?s)PartitionError.*left_modules.py:\d+ \(optimizer_step\) writes a value"):
        ranks2.call(fit_class, "pp2", left_modules.Assigns)
