"""Exchanges heartbeats, failures and decisions in the store of the ranks' rendezvous."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_hybrid.launch.failures import Answer, Cause, Failure, load


class FailureStore:
    """Reads and writes the failures of a run for one rank.

    Each call is one or a few round trips to the store, of about 30 microseconds each on one machine.

    Args:
        store: This rank's own connection to the store.
        rank: This rank.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._read = 0

    def beat(self, operation: str) -> None:
        """Sends a heartbeat with this rank's `operation`."""
        self._store.set(f"beat/{self._rank}", operation)

    def beat_of(self, rank: int) -> str | None:
        """Returns the operation in the last heartbeat of `rank`; None before the first."""
        key = f"beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def note_progress(self, progress: str) -> None:
        """Publishes how far this rank has come, for ranks that wait for it in `propose`."""
        self._store.set(f"progress/{self._rank}", progress)

    def progress_of(self, rank: int) -> str | None:
        """Returns what `rank` has published last by `note_progress`; None before."""
        key = f"progress/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def propose(self, question: str, text: str) -> tuple[int, str]:
        """Returns the first rank that has answered `question`, and its answer; `text` is that of this rank."""
        first = self._store.compare_set(f"proposal/{question}", "", f"{self._rank}:{text}").decode()
        rank, _, answer = first.partition(":")
        return int(rank), answer

    def object(self, question: str, text: str) -> None:
        """Notifies the other ranks that this rank's answer to `question` is `text`, not that of the first rank."""
        self._store.set(f"objection/{question}", f"{self._rank}:{text}")

    def objection(self, question: str) -> tuple[int, str] | None:
        """Returns a rank with another answer to `question` than the first rank's, and its answer; None without one."""
        key = f"objection/{question}"
        if not self._store.check([key]):
            return None
        rank, _, answer = self._store.get(key).decode().partition(":")
        return int(rank), answer

    def agree(self, question: str, ranks: int) -> int:
        """Adds `ranks` to the number of ranks with the first rank's answer to `question`, and returns the number."""
        return self._store.add(f"agreed/{question}", ranks)

    def forget(self, question: str) -> None:
        """Removes a question that all ranks have answered."""
        for kind in ("proposal", "agreed"):
            self._store.delete_key(f"{kind}/{question}")

    def leave(self) -> None:
        """Marks this rank's run as over, so that the rank may end."""
        self._store.set(f"left/{self._rank}", "")

    def has_left(self, rank: int) -> bool:
        """Returns True if the run of `rank` is over."""
        return self._store.check([f"left/{rank}"])

    def post(self, failure: Failure) -> None:
        """Posts `failure` to all ranks."""
        self._store.set(f"failure/{self._store.add('failures', 1)}", failure.dump())

    def new_failures(self) -> list[Failure]:
        """Returns the failures that this rank has not read yet."""
        found = []
        while self._store.check([f"failure/{self._read + 1}"]):
            self._read += 1
            found.append(load(Failure, self._store.get(f"failure/{self._read}")))
        return found

    def answer(self, answer: Answer) -> None:
        """Posts the location of this rank's main thread."""
        self._store.set(f"answer/{self._rank}", answer.dump())

    def answers(self, world_size: int) -> dict[int, Answer]:
        """Returns the answers that ranks have posted so far, by rank."""
        given = [r for r in range(world_size) if self._store.check([f"answer/{r}"])]
        return {r: load(Answer, self._store.get(f"answer/{r}")) for r in given}

    def decided(self) -> Cause | None:
        """Returns the cause on which a rank has decided; None before the decision."""
        return load(Cause, self._store.get("cause")) if self._store.check(["cause"]) else None

    def decide(self, choose: Callable[[], Cause]) -> Cause:
        """Returns the cause that `choose` returns on the first rank to call; the same on all ranks."""
        return self.decided() or load(Cause, self._store.compare_set("cause", "", choose().dump()))

    def claim_report(self) -> bool:
        """Returns True if this rank is the first to call, and therefore the reporter."""
        return self._store.add("reporter", 1) == 1

    def note_reported(self) -> None:
        """Notifies all ranks that the cause has been reported."""
        self._store.set("reported", "")

    def is_reported(self) -> bool:
        """Returns True if the cause has been reported."""
        return self._store.check(["reported"])

    def note_seen(self) -> None:
        """Counts this rank among those that know the cause."""
        self._store.add("seen", 1)

    def seen(self) -> int:
        """Returns the number of ranks that know the cause."""
        return self._store.add("seen", 0)
