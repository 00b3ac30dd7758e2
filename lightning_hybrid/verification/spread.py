"""Spreads a step of one process over the ranks of a replica: each runs it on the whole module, for parts of the batch.

The ranks of `tp` and `pp` have the same batch. If each ran all of it, the check would take as many steps as there are
such ranks. The mean over parts is the result of one process if the loss is a mean over samples, which it then shows.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from torch import Tensor

from lightning_hybrid.collectives import gather_objects, to_host
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.metrics.logs import LogRecorder
from lightning_hybrid.verification.mean import equal_parts
from lightning_hybrid.verification.reported import logged
from lightning_hybrid.verification.steps import Outcome, mean_of


class Spread:
    """Parts of the batch of a replica, by rank.

    Args:
        engine: The engine of the layout.
        args: Arguments of `training_step`, the batch first.
        microbatches: The number of microbatches, which must not be the parts: their mean would equal itself.
    """

    def __init__(self, engine: Engine, args: tuple, microbatches: int) -> None:
        self._engine, layout, place = engine, engine.plan.layout, engine.mesh.place
        self.ranks = layout.tp * layout.pp
        """The number of ranks of a replica."""
        parts, self.problem = equal_parts(engine, args, self.ranks, microbatches)
        self._holders = max(1, self.ranks // (len(parts) or 1))
        """The number of neighbors that run the same part."""
        index, each = place.pp * layout.tp + place.tp, max(1, len(parts) // self.ranks)
        first = index // self._holders * each
        self.own = parts[first : first + each]
        """Arguments of `training_step` for the parts of this rank."""

    def joined(self, outcome: Outcome) -> Outcome:
        """Returns an outcome with the loss and logs of all parts. Collective over a replica.

        Args:
            outcome: The outcome of this rank's parts. The result has its gradients, and its share of the weight.
        """
        own, mesh = to_host(outcome.of_parts), self._engine.mesh
        each = chain.from_iterable(gather_objects(gather_objects(own, mesh.group("tp")), mesh.group("pp")))
        losses, weights, recorder = list[tuple[Tensor, float]](), list[float](), LogRecorder(self._engine.root)
        for of_losses, of_weights, calls in list(each)[:: self._holders]:
            recorder.add(calls, len(losses))
            losses += of_losses
            weights += of_weights or []
        entries = recorder.reduced(weights or None)
        report = outcome.reported._replace(logged=logged(entries))
        weight = None if outcome.weight is None else outcome.weight / self._holders
        return replace(outcome, loss=mean_of(losses), reported=report, weight=weight)
