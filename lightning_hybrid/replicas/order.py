"""Checks, before each collective of a step, that all replicas are about to run the same one.

Each replica expects the collectives of the last step of the same kind, and runs them without asking. A replica whose
step differs (another module is called, a step returns no loss) asks the others through the failure monitor's store,
before the collective: where all differ alike, as with a branch by epoch, they go on and expect the new order. Otherwise
the replica stops with an error; the others, which wait in a collective, are ended by the failure monitor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lightning_hybrid._torch_private import in_backward, user_location
from lightning_hybrid.launch.questions import Difference, Place, Questions
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

LOGS = "logs "
"""Begins the event of a hook that logs values."""


class CollectiveOrder:
    """The order of the collectives of steps, on one replica.

    Args:
        questions: Compares this replica with the others; None: there are no others.
        layout: The layout.
        ranks: The ranks that run the collectives, by replica.
        replica: Index of this rank's replica.
    """

    def __init__(self, questions: Questions | None, layout: Layout, ranks: Sequence[int], replica: int) -> None:
        self._questions, self._layout, self._ranks, self._replica = questions, layout, list(ranks), replica
        self.in_step: Callable[[], bool] = lambda: True
        """Returns True while a step of the user runs; hooks follow it."""
        self._expected: dict[str, list[str]] = {}
        self._made: list[str] = []
        self._kind = ""
        self._asks = self._paused = False
        self._step = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignores the collectives in the context, which are none, or not those of a step."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def begin(self, kind: str) -> None:
        """Begins a step; steps of the same `kind` are expected to run the same collectives."""
        if self._paused or self._questions is None:
            return
        self.next(f"begins `{kind}`")
        self._expected[self._kind] = self._made
        self._kind, self._made, self._asks = kind, [], False
        self._step += 1
        self._questions.at(Place(self._step, 0))

    def next(self, event: str, where: str | None = None) -> None:
        """Checks that all replicas are about to run the collective `event`, or to do what it says.

        Args:
            event: What this replica is about to do.
            where: The place in the user's code; None: the place that calls.

        Raises:
            PartitionError: If another replica is about to do something else.
        """
        if self._paused or self._questions is None:
            return
        number, expected = len(self._made), self._expected.get(self._kind, [])
        self._asks |= number >= len(expected) or expected[number] != event
        if self._asks:
            difference = self._questions.compare(Place(self._step, number), event)
            if difference is not None:
                raise PartitionError(self._message(event, where, difference, expected[number : number + 1]))
        self._made.append(event)
        self._questions.at(Place(self._step, number + 1))

    def _message(self, event: str, where: str | None, difference: Difference, expected: list[str]) -> str:
        when = "in" if where is not None or in_backward() or self.in_step() else "after"
        step = f"{when} `{self._kind.partition(':')[0]}`, " if self._kind else ""
        where = "in the backward pass" if in_backward() else f"at {where or user_location()}"
        if difference.rank in self._ranks:
            other = f"replica {self._ranks.index(difference.rank)} {difference.answer or (expected or ['goes on'])[0]}"
        else:
            other = "other replicas have not come to the same place"
        layout = self._layout
        advice = " What one replica only has to log can be logged with `rank_zero_only=True` on rank 0."
        if not event.startswith(LOGS):
            advice = ""
        if layout.fsdp > 1 and when == "in":
            advice = (
                f" Or use `layout='{layout.moved('fsdp', 'dp')}'`, under which replicas may call different modules."
            )
        return (
            f"`layout='{layout}'`: {step}{where}, replica {self._replica} {event}, but "
            f"{other}. All replicas must do this in the same order, since they do it together. Make the choice alike "
            f"on all replicas: by `batch_idx`, the epoch, or a random generator with the same seed.{advice}"
        )
