"""A training step that checks run on the whole module, as one process does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.parallelize.whole import Weights
from lightning_hybrid.verification.steps import Conditions, Outcome, mean_in_one_process


@dataclass(frozen=True, kw_only=True)
class WholeStep:
    """A training step and the weights with which one process runs it."""

    engine: Engine
    weights: Weights
    args: tuple
    """Arguments of `training_step`, the batch first."""
    kwargs: dict[str, Any]
    how: Conditions

    def mean(self, batches: Sequence[tuple], shares: Sequence[float], scale: float | None = None) -> Outcome:
        """Returns the mean over steps on `batches`, see `mean_in_one_process`."""
        runner = self.engine.runner
        return mean_in_one_process(runner, self.weights, batches, self.kwargs, self.how, shares, scale=scale)

    def shares(self, parts: int) -> list[float] | None:
        """Returns the weights of parts of the batch by tokens, if the data says how many; None: by samples."""
        weights = self.engine.run.data.batch_weights()
        return None if weights is None or weights.tokens is None else weights.tokens.weights(parts)
