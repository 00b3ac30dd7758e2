"""Callbacks that a user adds to a run. Decisions are made in `adapt`, state is changed by the strategy."""

import warnings
from typing import Any

from lightning_hybrid.adapt.batch_schedule import BatchSizeSchedule
from lightning_hybrid.adapt.batch_size import DecisionRules
from lightning_hybrid.adapt.phases import Phase, Plateau
from lightning_hybrid.adapt.rebalance import RebalancingRules
from lightning_hybrid.callbacks.adaptive_batch_size import AdaptiveBatchSize
from lightning_hybrid.callbacks.answer_score import AnswerScore
from lightning_hybrid.callbacks.load_rebalancing import LoadRebalancing
from lightning_hybrid.callbacks.monitor import HybridMonitor
from lightning_hybrid.callbacks.phase_schedule import PhaseSchedule
from lightning_hybrid.callbacks.sample import GenerateSample
from lightning_hybrid.callbacks.throughput import TokenThroughput

__all__ = [
    "AdaptiveBatchSize",
    "AnswerScore",
    "BatchSizeSchedule",
    "DecisionRules",
    "GenerateSample",
    "HybridMonitor",
    "LoadRebalancing",
    "Phase",
    "PhaseSchedule",
    "Plateau",
    "RebalancingRules",
    "TokenThroughput",
]


def __getattr__(name: str) -> Any:
    if name == "ThroughputMonitor":  # Lightning has a callback of this name
        warnings.warn(
            "`lightning_hybrid.callbacks.ThroughputMonitor` is called `TokenThroughput` now; the next release "
            "removes the old name.",
            DeprecationWarning,
            stacklevel=2,
        )
        return TokenThroughput
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
