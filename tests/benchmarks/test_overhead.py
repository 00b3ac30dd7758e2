"""The benchmark runs, its table has a line for every layout, and no figure is out of all proportion."""

from __future__ import annotations

import re

import pytest

from tests.benchmarks import monitor, safety
from tests.benchmarks.contestants import Size
from tests.benchmarks.memory import MemorySize, measure_memory
from tests.benchmarks.overhead import COMPARISONS, run, table

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

LIMIT = 1.5
"""The bounds of the table are for a quiet machine and many rounds; a test on a busy one gets by with this."""
SHORT = Size(time=64, batch=4)


@pytest.mark.parametrize("line", COMPARISONS, ids=lambda line: line.layout)
def test_step_time_is_near_that_of_hand_written_code(line) -> None:
    results = run([line.layout], rounds=4, steps=3, size=SHORT)
    head, rule, row = table(results).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == 9
    assert row.startswith(f"| `{line.layout}` | {line.reference} |")
    assert results[0][1].ratio < LIMIT, row


def test_rank_takes_less_memory_than_a_single_process() -> None:
    size = MemorySize(width=256, heads=4)
    rows = measure_memory(["fsdp2", "pp2"], size).splitlines()[2:]
    assert [re.split(r"\s*\|\s*", row)[1] for row in rows] == ["single process", "`fsdp2`", "`pp2`"]
    shares = [float(re.split(r"\s*\|\s*", row)[3]) for row in rows]
    assert shares[0] == 1.0
    assert max(shares[1:]) < 0.8, rows


def test_checks_of_a_step_cost_little() -> None:
    costs = safety.run(["pp2"], rounds=4, steps=3, size=SHORT)
    assert len(costs["pp2"].steps.ours) == len(costs["pp2"].steps.reference) == 4
    assert costs["pp2"].steps.ratio < LIMIT
    assert costs["pp2"].watch_share < 0.02
    assert safety.table(costs).splitlines()[2].startswith("| `pp2` |")


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_the_monitor_costs_little(layout: str) -> None:
    costs = safety.run([layout], rounds=6, steps=10, size=SHORT, kind=monitor.Monitored)
    assert costs[layout].steps.cpu_ratio < LIMIT
