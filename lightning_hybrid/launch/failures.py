"""Describes failures and decides on their cause: plain data and decisions, the same on every rank.

A rank that raises, or detects that another rank has ended, posts a `Failure`. From all failures `choose_cause` picks
the single cause that is reported: a closed connection or a timeout on one rank is usually secondary to a failure of
another rank.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch.distributed import DistError  # type: ignore[attr-defined]

Kind = Literal["raised", "ended", "timeout", "secondary"]

_LONGEST_TEXT = 400


class RankFailed(SystemExit):
    """Ends a rank without output, because another rank reports the failure."""

    def __init__(self, reason: str) -> None:
        super().__init__(1)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure of one rank."""

    rank: int
    """The rank that failed; a failure of kind `ended` is posted by another rank."""
    kind: Kind
    """`raised`: the rank raised an exception; `ended`: its process ended without posting a failure; `timeout`: the rank
    waited for another rank until the timeout; `secondary`: the rank lost the connection to another rank."""
    text: str
    operation: str = ""
    """The operation that the rank was in; empty if unknown."""

    def dump(self) -> str:
        """Returns the failure as text for the store."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The location of a rank's main thread when the rank learns of a failure."""

    operation: str
    where: str
    waiting: bool
    """True if the main thread waits in a collective instead of running the user's code."""

    def dump(self) -> str:
        """Returns the answer as text for the store."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Cause:
    """The cause for which the run ends."""

    kind: Kind
    rank: int | None
    """The rank that caused the failure; None for the launcher, or if no single rank did."""
    text: str
    reporter: int | None
    """The rank that reports the cause, by raising its own exception; None: the first rank that can."""

    def dump(self) -> str:
        """Returns the cause as text for the store."""
        return json.dumps(asdict(self))


def failure_of(error: BaseException, rank: int, operation: str) -> Failure:
    """Returns the failure that `rank` posts for its exception `error`, raised in `operation`."""
    text = f"{type(error).__name__}: {error}"
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + " ..."
    return Failure(rank=rank, kind=_kind(error), text=text, operation=operation)


def _kind(error: BaseException) -> Kind:
    for link in _chain(error):
        text = str(link)
        if isinstance(link, DistError) or (isinstance(link, RuntimeError) and "gloo/transport" in text):
            return "timeout" if "timeout" in text.lower() or "timed out" in text.lower() else "secondary"
    return "raised"


def _chain(error: BaseException) -> Iterable[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


# ---- when to decide

_SETTLE_SECONDS: Mapping[Kind, float] = {"raised": 1.0, "ended": 1.0, "timeout": 3.0, "secondary": 8.0}
"""Seconds to wait for failures of other ranks after the first failure of each kind; empirical. A secondary failure
alone leaves the cause open: a rank of another machine that has ended is noticed only after a few seconds."""


def is_ripe(failures: Collection[Failure], world_size: int, seconds: float) -> bool:
    """Returns True if the cause can be decided, `seconds` after the first failure was seen."""
    if len({f.rank for f in failures}) == world_size:
        return True
    return bool(failures) and seconds >= min(_SETTLE_SECONDS[f.kind] for f in failures)


# ---- the cause


def choose_cause(
    failures: Collection[Failure],
    *,
    world_size: int,
    own_rank: int,
    own_operation: str,
    answers: Mapping[int, Answer],
    stopped: Collection[int],
    timeout: str,
) -> Cause:
    """Returns the single cause of all `failures`.

    Args:
        failures: At least one failure.
        world_size: Number of ranks.
        own_rank: The deciding rank.
        own_operation: The operation of the deciding rank.
        answers: The answers of ranks, by rank; a rank that does not answer in time is missing.
        stopped: Ranks whose process is known to be stopped (SIGSTOP).
        timeout: The timeout of collectives, for the text.
    """
    by_kind = {kind: [f for f in failures if f.kind == kind] for kind in _SETTLE_SECONDS}
    posted = {f.rank for f in failures if f.kind != "ended"}
    if by_kind["raised"]:
        first = min(by_kind["raised"], key=lambda f: f.rank)
        text = f"Rank {first.rank} of {world_size} failed {_at(first.operation)}: {first.text}"
        return Cause(kind="raised", rank=first.rank, text=text, reporter=first.rank)
    ended = [f for f in by_kind["ended"] if f.rank not in posted]
    if ended:
        rank = min(f.rank for f in ended)
        text = " ".join(max((f.text for f in ended if f.rank == rank), key=len).split())
        last = next((f.operation for f in ended if f.rank == rank and f.operation), "")
        heard = f" It last reported from where it was {_at(last)}." if last else ""
        at = _at(own_operation)
        text = f"Rank {rank} of {world_size} ended without a word: {text}. Rank {own_rank} was {at}.{heard}"
        return Cause(kind="ended", rank=rank, text=text, reporter=None)
    if by_kind["timeout"]:
        places_of = {f.rank: f.operation for f in failures if f.kind in ("timeout", "secondary")}
        return _hang(places_of, world_size, answers, stopped, timeout)
    first = min(failures, key=lambda f: f.rank)
    text = f"Rank {first.rank} of {world_size} lost the connection to another rank {_at(first.operation)}: {first.text}"
    return Cause(kind="secondary", rank=first.rank, text=text, reporter=first.rank)


def _hang(
    places_of: Mapping[int, str], world_size: int, answers: Mapping[int, Answer], stopped: Collection[int], timeout: str
) -> Cause:
    """Names the rank that caused a hang: one that does not respond, otherwise one that is not inside a collective."""
    posted = set(places_of)
    others = [r for r in range(world_size) if r not in posted]
    silent = sorted((r for r in others if r in stopped or r not in answers), key=lambda r: r not in stopped)
    busy = [r for r in others if r in answers and not answers[r].waiting]
    places = [f"rank {r} {_at(places_of[r])}" for r in range(world_size) if r in places_of][:8]
    waiting = f" ({'; '.join(places)})" if places else ""
    if silent:
        rank = silent[0]
        why = "its process is stopped (SIGSTOP)" if rank in stopped else "its process does not run, or not reachably"
        last = f" It was last {_at(answers[rank].operation)}." if rank in answers else ""
        text = f"Rank {rank} of {world_size} gives no answer: {why}. Others waited {timeout} for it{waiting}.{last}"
        return Cause(kind="timeout", rank=rank, text=text, reporter=None)
    if busy:
        rank, answer = busy[0], answers[busy[0]]
        text = (
            f"Rank {rank} of {world_size} hangs {_at(answer.operation)}, at {answer.where}. Others waited {timeout} "
            f"for it{waiting}. If it only needs longer, raise the strategy's `timeout`."
        )
        return Cause(kind="timeout", rank=rank, text=text, reporter=None)
    each = "; ".join(f"rank {r} {_at(a.operation)}, at {a.where}" for r, a in sorted(answers.items())[:8])
    text = (
        f"The ranks waited {timeout} for each other, each in another collective: {each}. All ranks must make the "
        "same calls in the same order; look for code that depends on the rank."
    )
    return Cause(kind="timeout", rank=None, text=text, reporter=None)


def _at(operation: str) -> str:
    return operation if operation.startswith("after ") else f"in {operation}"


def load(kind: type[Any], text: bytes | str) -> Any:
    """Returns the `Failure`, `Answer` or `Cause` (`kind`) of which `text` is the dump."""
    return kind(**json.loads(text))
