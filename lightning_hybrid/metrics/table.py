"""The plan as a table, printed once at start, and as a record for loggers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_hybrid.spec.plan import Plan


def plan_table(
    plan: Plan, sizes: Mapping[str, int], blocks: Sequence[str], sharded: Sequence[tuple[str, str]]
) -> Table:
    """The stages and what is sharded.

    Args:
        plan: The plan.
        sizes: Elements of each parameter.
        blocks: Names of the model's blocks.
        sharded: Rows of what is sharded and how, such as `("72 weights in 12 blocks", "tp: columns and rows")`.
    """
    title = f"{plan.layout}: {plan.schedule}, {plan.microbatches} microbatches, predicted bubble {plan.bubble:.0%}"
    table = Table(title=title if plan.layout.pp > 1 else str(plan.layout), title_justify="left")
    for heading, right in (("stage", True), ("rank", True), ("modules", False), ("blocks", True), ("parameters", True)):
        table.add_column(heading, justify="right" if right else "left")
    table.add_column("FLOPs", justify="right")
    chosen = set(blocks)
    for stage in plan.stages:
        count = sum(sizes[n] for n in stage.parameters)
        span = f"{stage.units[0]} .. {stage.units[-1]}" if len(stage.units) > 1 else "".join(stage.units)
        share = f"{stage.flop_share:.0%}" if stage.flop_share else "-"
        number = str(sum(u in chosen for u in stage.units))
        table.add_row(str(stage.index), str(stage.rank), span or "all", number, f"{count:,}", share)
    for what, how in sharded:
        table.add_row("", "", what, "", "", how)
    return table


def plan_record(plan: Plan, sizes: Mapping[str, int], sharded: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The plan in numbers, texts, lists and dictionaries, for the configuration of a run that loggers keep.

    Args:
        plan: The plan.
        sizes: Elements of each parameter.
        sharded: As for `plan_table`.
    """
    record: dict[str, Any] = {"layout": str(plan.layout), "devices": plan.layout.devices}
    if plan.layout.pp > 1:
        record |= {"schedule": plan.schedule, "microbatches": plan.microbatches, "bubble": round(plan.bubble, 4)}
        record["stages"] = [
            {
                "rank": stage.rank,
                "first_module": stage.units[0],
                "last_module": stage.units[-1],
                "parameters": sum(sizes[n] for n in stage.parameters),
                "flop_share": round(stage.flop_share, 4),
            }
            for stage in plan.stages
        ]
    if sharded:
        record["sharded"] = [f"{what}: {how}" for what, how in sharded]
    return record


def print_table(table: Table) -> None:
    """Prints to standard error, where progress bars and warnings go, at a width that fits a log file too."""
    width = None if "COLUMNS" in os.environ else 110
    Console(stderr=True, width=width).print(table)
