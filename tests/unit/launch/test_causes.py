"""The cause of a failed run, on all ranks alike, from what the ranks have posted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch.distributed as dist

from lightning_hybrid.launch.agreement import check_facts
from lightning_hybrid.launch.failures import Answer, Cause, Failure, choose_cause, failure_of, is_ripe, load
from lightning_hybrid.launch.processes import exit_text, process_state

GLOO_CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:12467"
GLOO_TIMEOUT = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 4000ms for recv"


def _raised(rank: int) -> Failure:
    return failure_of(ValueError("bad"), rank, "training_step of batch 7")


def _secondary(rank: int) -> Failure:
    return failure_of(RuntimeError(GLOO_CLOSED), rank, "backward of batch 7")


def _timeout(rank: int) -> Failure:
    return failure_of(RuntimeError(GLOO_TIMEOUT), rank, "backward of batch 7")


def _ended(rank: int, text: str = "its process (pid 7) is gone") -> Failure:
    return Failure(rank=rank, kind="ended", text=text)


def _cause(*failures: Failure, answers: dict[int, Answer] | None = None, stopped: tuple[int, ...] = ()) -> Cause:
    options: dict[str, Any] = {"own_rank": 0, "own_operation": "training_step of batch 7", "timeout": "0:00:04"}
    return choose_cause(failures, world_size=4, answers=answers or {}, stopped=stopped, **options)


def _answers(**busy: str) -> dict[int, Answer]:
    """All four ranks wait, but for those that are named as `rank2="user.py:3 (f)"`."""
    answers = {r: Answer(operation="backward of batch 7", where="x.py:1 (x)", waiting=True) for r in range(4)}
    for name, where in busy.items():
        answers[int(name[4:])] = Answer(operation="training_step of batch 7", where=where, waiting=False)
    return answers


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError(GLOO_CLOSED), "secondary"),
        (RuntimeError(GLOO_TIMEOUT), "timeout"),
        (dist.DistNetworkError("Broken pipe"), "secondary"),  # type: ignore[attr-defined]
        (dist.DistBackendError("Watchdog caught collective operation timeout"), "timeout"),  # type: ignore[attr-defined]
        (TimeoutError("the user's download timed out"), "raised"),
        (RuntimeError("the user's connection was closed"), "raised"),
        (ValueError("x"), "raised"),
    ],
)
def test_only_errors_of_collectives_are_secondary(error: BaseException, kind: str) -> None:
    assert failure_of(error, 0, "").kind == kind
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = error
    assert failure_of(wrapped, 0, "").kind == kind


def test_own_exception_before_everything_else() -> None:
    cause = _cause(_secondary(0), _ended(3), _raised(2), _raised(1), _timeout(3))
    assert (cause.kind, cause.rank, cause.reporter) == ("raised", 1, 1)
    assert "Rank 1 of 4" in cause.text
    assert "training_step of batch 7: ValueError: bad" in cause.text


def test_a_rank_that_said_why_did_not_end_without_a_word() -> None:
    assert _cause(_secondary(0), _secondary(1), _ended(1), _ended(2)).rank == 2


def test_ended_with_what_its_parent_knows() -> None:
    cause = _cause(_ended(2), _ended(2, "its process (pid 7) ended by signal 9 (SIGKILL)"), _secondary(0))
    assert (cause.rank, cause.reporter) == (2, None)
    assert "SIGKILL" in cause.text
    assert "Rank 0 was in training_step of batch 7" in cause.text


def test_hang_in_user_code() -> None:
    cause = _cause(_timeout(0), _secondary(3), answers=_answers(rank2="user.py:33 (training_step)"))
    assert cause.rank == 2
    assert "hangs in training_step of batch 7, at user.py:33 (training_step)" in cause.text
    assert "waited 0:00:04" in cause.text


def test_hang_of_a_stopped_rank_before_one_that_waits_for_it() -> None:
    answers = _answers(rank1="user.py:33 (load)")
    del answers[2]
    cause = _cause(_timeout(0), answers=answers, stopped=(2,))
    assert cause.rank == 2
    assert "SIGSTOP" in cause.text


def test_all_wait_for_each_other() -> None:
    cause = _cause(_timeout(0), _timeout(1), answers=_answers())
    assert cause.rank is None
    assert "each in another collective" in cause.text


def test_a_secondary_failure_alone_is_shown_in_the_end() -> None:
    cause = _cause(_secondary(3), _secondary(2))
    assert (cause.kind, cause.reporter) == ("secondary", 2)


def test_when_to_decide() -> None:
    assert not is_ripe([], 2, 100.0)
    assert not is_ripe([_raised(1)], 2, 0.5)
    assert is_ripe([_raised(1)], 2, 1.5)
    assert is_ripe([_raised(1), _raised(0)], 2, 0.0)
    assert not is_ripe([_timeout(0)], 2, 2.0)
    assert not is_ripe([_secondary(0)], 2, 5.0)


def test_through_the_store_and_back() -> None:
    failure = _raised(3)
    assert load(Failure, failure.dump()) == failure
    cause = _cause(failure)
    assert load(Cause, cause.dump()) == cause


def test_states_of_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert process_state(process.pid) == "running"
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while process_state(process.pid) != "stopped":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        while process_state(process.pid) != "gone":  # a zombie is gone
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not os.path.exists(f"/proc/{process.pid}")
    assert process_state(process.pid) == "gone"
    assert "SIGKILL" in exit_text(-9)
    assert exit_text(3) == "exit code 3"


def test_facts_that_differ_are_named_with_the_rank() -> None:
    same = {"the version of torch": "2.13", "`layout` of the strategy": "dp2"}
    check_facts([same, dict(same), dict(same)])
    with pytest.raises(ValueError, match=r"`layout` of the strategy is dp2 on rank 0 and pp2 on rank 2"):
        check_facts([same, same, {**same, "`layout` of the strategy": "pp2"}])
    with pytest.raises(ValueError, match=r"`new` is nothing on rank 0 and 1 on rank 1"):
        check_facts([same, {**same, "`new`": "1"}])
