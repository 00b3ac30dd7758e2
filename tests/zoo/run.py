"""Runs one case under one layout and judges the outcome."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from tests.harness import RankError, RankGroup
from tests.zoo.case import Case
from tests.zoo.reference import Run, compare, run_hybrid, run_single

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")
TIMEOUT_SECONDS = 60.0
"""A call that takes longer has hung; the slowest takes a few seconds."""
RANDOM_LOSS_TOLERANCE = 0.1
"""How far the losses of a model with dropout may be from those of one process, relative."""

Status = Literal["exact", "trained", "refused", "wrong", "crashed", "hung"]


@dataclass(frozen=True)
class Combination:
    """A layout, with the schedule where there is a pipeline."""

    layout: str
    schedule: str = "1F1B"

    @classmethod
    def parse(cls, text: str) -> list[Combination]:
        """`"pp2"` stands for all schedules, `"pp2/GPipe"` for one; layouts of several axes use 1F1B."""
        layout, _, schedule = text.partition("/")
        if schedule and schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r} in {text!r}; known: {', '.join(SCHEDULES)}")
        if schedule or not layout.startswith("pp"):
            return [cls(layout, schedule or "1F1B")]
        return [cls(layout, each) for each in SCHEDULES]

    @property
    def axes(self) -> dict[str, int]:
        """Sizes by axis."""
        return {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", self.layout)}

    @property
    def devices(self) -> int:
        """Number of ranks."""
        return math.prod(self.axes.values())

    def __str__(self) -> str:
        """As in `parse`."""
        return f"{self.layout}/{self.schedule}" if "pp" in self.axes else self.layout


@dataclass(frozen=True)
class Outcome:
    """How one case went under one layout."""

    status: Status
    update_error: float = math.nan
    """Largest relative error of a parameter's update."""
    detail: str = ""
    """What is wrong, or the text of the refusal."""


class References:
    """Single-process runs, each made once."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, bool], Run] = {}

    def get(self, case: Case, *, validate: bool = False) -> Run:
        """The run of the case in this process."""
        if (case.name, validate) not in self._runs:
            self._runs[case.name, validate] = run_single(case, validate=validate)
        return self._runs[case.name, validate]


def evaluate(
    case: Case, combination: Combination, ranks: RankGroup, references: References, *, validate: bool = False
) -> Outcome:
    """Train the case under the layout and compare with the single process."""
    single = references.get(case, validate=validate)
    try:
        runs = ranks.call(
            run_hybrid,
            case.name,
            combination.layout,
            combination.schedule,
            case.microbatches,
            validate=validate,
            timeout_seconds=TIMEOUT_SECONDS,
        )
    except RankError as error:
        if error.kind == "PartitionError":
            return Outcome("refused", detail=error.failure.message)
        return Outcome("hung" if error.kind == "Hang" else "crashed", detail=str(error))
    comparison = compare(single, runs)
    if case.exact:
        status = "wrong" if comparison.problems else "exact"
        return Outcome(status, comparison.update_error, "; ".join(comparison.problems))
    return _judge_random(single, runs)


def _judge_random(single: Run, runs: list[Run]) -> Outcome:
    """With dropout: the initial weights are equal, the losses are near those of one process."""
    if any(not single.initial[name].equal(value) for name, value in runs[0].initial.items()):
        return Outcome("wrong", detail="initial weights differ")
    for run in runs:
        for loss, expected in zip(run.losses, single.losses, strict=True):
            if not abs(loss - expected) <= RANDOM_LOSS_TOLERANCE * abs(expected):
                return Outcome("wrong", detail=f"loss {loss:.4f} is far from {expected:.4f}")
    return Outcome("trained")
