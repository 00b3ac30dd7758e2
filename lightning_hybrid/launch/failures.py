"""What is known when a run fails, and who caused it: plain data and decisions, the same on every rank.

A rank that raises, or sees another one gone, posts a `Failure`. From all of them `choose_cause` picks the one thing
that is shown: a connection that closes or a time-out on one rank is the echo of what happened on another.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch.distributed import DistError  # type: ignore[attr-defined]

Kind = Literal["raised", "ended", "timeout", "echo"]

_LONGEST_TEXT = 400


class RankFailed(SystemExit):
    """Ends a rank without a word, because another one shows what happened."""

    def __init__(self, reason: str) -> None:
        super().__init__(1)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One thing that went wrong on one rank."""

    rank: int
    """The rank that failed, which for `ended` is not the one that posts it."""
    kind: Kind
    """`raised`: an exception of its own; `ended`: the process is gone without a word; `timeout`: waited for another
    rank in vain; `echo`: lost the connection to another rank."""
    text: str
    doing: str = ""
    """The operation that the rank was in, as far as it is known."""

    def dump(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Where a rank's main thread is at the moment at which it hears of a failure."""

    doing: str
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
    """The rank that shows it, by raising its own exception; None: the first that can."""

    def dump(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))


def failure_of(error: BaseException, rank: int, doing: str) -> Failure:
    """What a rank posts about an exception that it has raised."""
    text = f"{type(error).__name__}: {error}"
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + " ..."
    return Failure(rank=rank, kind=_kind(error), text=text, doing=doing)


def _kind(error: BaseException) -> Kind:
    for link in _chain(error):
        text = str(link)
        if isinstance(link, DistError) or (isinstance(link, RuntimeError) and "gloo/transport" in text):
            return "timeout" if "timeout" in text.lower() or "timed out" in text.lower() else "echo"
    return "raised"


def _chain(error: BaseException) -> Iterable[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


# ---- when to decide

_SETTLE_SECONDS: Mapping[Kind, float] = {"raised": 1.0, "ended": 1.0, "timeout": 3.0, "echo": 8.0}
"""How long to wait for what other ranks have to say after the first failure of each kind; empirical. Only an echo
leaves the cause open: another machine's silence takes a few seconds to notice."""


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
    own_doing: str,
    answers: Mapping[int, Answer],
    stopped: Collection[int],
    timeout: str,
) -> Cause:
    """The one cause of all `failures`.

    Args:
        failures: At least one.
        world_size: Number of ranks.
        own_rank: The rank that decides.
        own_doing: The operation that it is in.
        answers: Where ranks are; a rank that gives no answer in time is missing.
        stopped: Ranks whose process is known to be stopped (SIGSTOP).
        timeout: How long a collective waits, for the text.
    """
    by_kind = {kind: [f for f in failures if f.kind == kind] for kind in _SETTLE_SECONDS}
    posted = {f.rank for f in failures if f.kind != "ended"}
    if by_kind["raised"]:
        first = min(by_kind["raised"], key=lambda f: f.rank)
        text = f"Rank {first.rank} of {world_size} failed {_at(first.doing)}: {first.text}"
        return Cause(kind="raised", rank=first.rank, text=text, reporter=first.rank)
    ended = [f for f in by_kind["ended"] if f.rank not in posted]
    if ended:
        rank = min(f.rank for f in ended)
        text = " ".join(max((f.text for f in ended if f.rank == rank), key=len).split())
        last = next((f.doing for f in ended if f.rank == rank and f.doing), "")
        heard = f" It last reported from where it was {_at(last)}." if last else ""
        text = f"Rank {rank} of {world_size} ended without a word: {text}. Rank {own_rank} was {_at(own_doing)}.{heard}"
        return Cause(kind="ended", rank=rank, text=text, reporter=None)
    if by_kind["timeout"]:
        places_of = {f.rank: f.doing for f in failures if f.kind in ("timeout", "echo")}
        return _hang(places_of, world_size, answers, stopped, timeout)
    first = min(failures, key=lambda f: f.rank)
    text = f"Rank {first.rank} of {world_size} lost the connection to another rank {_at(first.doing)}: {first.text}"
    return Cause(kind="echo", rank=first.rank, text=text, reporter=first.rank)


def _hang(
    places_of: Mapping[int, str], world_size: int, answers: Mapping[int, Answer], stopped: Collection[int], timeout: str
) -> Cause:
    """The rank that the others waited for: one that gives no answer, else one that is not in a collective itself."""
    posted = set(places_of)
    others = [r for r in range(world_size) if r not in posted]
    silent = sorted((r for r in others if r in stopped or r not in answers), key=lambda r: r not in stopped)
    busy = [r for r in others if r in answers and not answers[r].waiting]
    places = [f"rank {r} {_at(places_of[r])}" for r in range(world_size) if r in places_of][:8]
    waiting = f" ({'; '.join(places)})" if places else ""
    if silent:
        rank = silent[0]
        why = "its process is stopped (SIGSTOP)" if rank in stopped else "its process does not run, or not reachably"
        last = f" It was last {_at(answers[rank].doing)}." if rank in answers else ""
        text = f"Rank {rank} of {world_size} gives no answer: {why}. Others waited {timeout} for it{waiting}.{last}"
        return Cause(kind="timeout", rank=rank, text=text, reporter=None)
    if busy:
        rank, answer = busy[0], answers[busy[0]]
        text = (
            f"Rank {rank} of {world_size} hangs {_at(answer.doing)}, at {answer.where}. Others waited {timeout} for it"
            f"{waiting}. If it only needs longer, raise the strategy's `timeout`."
        )
        return Cause(kind="timeout", rank=rank, text=text, reporter=None)
    each = "; ".join(f"rank {r} {_at(a.doing)}, at {a.where}" for r, a in sorted(answers.items())[:8])
    text = (
        f"The ranks waited {timeout} for each other, each in another collective: {each}. All ranks must make the "
        "same calls in the same order; look for code that depends on the rank."
    )
    return Cause(kind="timeout", rank=None, text=text, reporter=None)


def _at(doing: str) -> str:
    return doing if doing.startswith("after ") else f"in {doing}"


def load(kind: type[Any], text: bytes | str) -> Any:
    """A `Failure`, `Answer` or `Cause` from the store."""
    return kind(**json.loads(text))
