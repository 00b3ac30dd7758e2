"""Heartbeats, failures and decisions that the ranks exchange in the store of their rendezvous."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_hybrid.launch.failures import Answer, Cause, Failure, load


class FailureStore:
    """One rank's view; each call is one or a few round trips to the store, of some 30 microseconds on one machine.

    Args:
        store: A connection of its own.
        rank: This rank.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._read = 0

    def beat(self, operation: str) -> None:
        """Sends a heartbeat with this rank's operation."""
        self._store.set(f"beat/{self._rank}", operation)

    def beat_of(self, rank: int) -> str | None:
        """Returns the last heartbeat of another rank."""
        key = f"beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def leave(self) -> None:
        """This rank's run is over, and it may end."""
        self._store.set(f"left/{self._rank}", "")

    def has_left(self, rank: int) -> bool:
        """Whether a rank's run is over."""
        return self._store.check([f"left/{rank}"])

    def post(self, failure: Failure) -> None:
        """Posts a failure to all ranks."""
        self._store.set(f"failure/{self._store.add('failures', 1)}", failure.dump())

    def new_failures(self) -> list[Failure]:
        """Those that this rank has not read yet."""
        found = []
        while self._store.check([f"failure/{self._read + 1}"]):
            self._read += 1
            found.append(load(Failure, self._store.get(f"failure/{self._read}")))
        return found

    def answer(self, answer: Answer) -> None:
        """Posts where this rank's main thread is."""
        self._store.set(f"answer/{self._rank}", answer.dump())

    def answers(self, world_size: int) -> dict[int, Answer]:
        """Returns what ranks have posted so far."""
        given = [r for r in range(world_size) if self._store.check([f"answer/{r}"])]
        return {r: load(Answer, self._store.get(f"answer/{r}")) for r in given}

    def decided(self) -> Cause | None:
        """The cause that one of the ranks has decided on."""
        return load(Cause, self._store.get("cause")) if self._store.check(["cause"]) else None

    def decide(self, choose: Callable[[], Cause]) -> Cause:
        """The cause, which is the choice of the first rank that asks; the same for all."""
        return self.decided() or load(Cause, self._store.compare_set("cause", "", choose().dump()))

    def claim_report(self) -> bool:
        """Returns whether this rank is the first to ask, and therefore the reporter."""
        return self._store.add("reporter", 1) == 1

    def note_reported(self) -> None:
        """Tells all ranks that the cause has been shown."""
        self._store.set("reported", "")

    def is_reported(self) -> bool:
        """Returns whether the cause has been shown."""
        return self._store.check(["reported"])

    def note_seen(self) -> None:
        """This rank knows the cause."""
        self._store.add("seen", 1)

    def seen(self) -> int:
        """How many ranks know the cause."""
        return self._store.add("seen", 0)
