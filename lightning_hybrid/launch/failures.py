"""What is known when a run fails, and who caused it: plain data and decisions, the same on every rank.

A rank that raises, or sees another one gone, posts a `Failure`. From all of them `choose_cause` picks the one thing
that is shown: a closed connection or a time-out on one rank is usually secondary to a failure of another.
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
    """One thing that went wrong on one rank."""

    rank: int
    """The rank that failed; for `ended`, another rank posts it."""
    kind: Kind
    """`raised`: an exception of its own; `ended`: the process is gone without a word; `timeout`: waited for another
    rank in vain; `secondary`: lost the connection to another rank."""
    text: str
    operation: str = ""
    """The operation that the rank was in, as far as it is known."""

    def dump(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Where a rank's main thread is when it learns of a failure."""

    operation: str
    where: str
    waiting: bool
    """Whether it waits in a collective, rather than runs the user's code."""

    def dump(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why the run ends."""

    kind: Kind
    rank: int | None
    """The rank that caused it; None: the launcher."""
    text: str
    reporter: int | None
    """The rank that reports it, by raising its own exception; None: the first that can."""

    def dump(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))


def failure_of(error: BaseException, rank: int, operation: str) -> Failure:
    """Returns what a rank posts about an exception that it has raised."""
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
"""How long to wait for what other ranks post after the first failure of each kind; empirical. A secondary failure alone
leaves the cause open: that a rank of another machine is gone takes a few seconds to notice."""


def is_ripe(failures: Collection[Failure], world_size: int, seconds: float) -> bool:
    """Whether the cause can be decided, `seconds` after the first failure was seen."""
    if len({f.rank for f in failures}) == world_size:
        return True
    return bool(failures) and seconds >= min(_SETTLE_SECONDS[f.kind] for f in failures)


# ---- who it was


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
    """Chooses the one cause of all `failures`.

    Args:
        failures: At least one.
        world_size: Number of ranks.
        own_rank: The rank that decides.
        own_operation: The operation that it is in.
        answers: Where ranks are; a rank that gives no answer in time is missing.
        stopped: Ranks whose process is known to be stopped (SIGSTOP).
        timeout: How long a collective waits, for the text.
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
    """Reads a `Failure`, `Answer` or `Cause` from the store."""
    return kind(**json.loads(text))
