"""The harness itself: results, errors, hangs and recycling."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankError, RankGroup


def _sum_of_ranks() -> float:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return value.item()


def _pid() -> int:
    return os.getpid()


def _fail_on(rank: int) -> None:
    _sum_of_ranks()
    if dist.get_rank() == rank:
        raise LookupError("the real cause")
    dist.barrier()


def _hang_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        time.sleep(60)


def _exit_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os._exit(7)


def test_results_in_order_and_group_stays(ranks2: RankGroup) -> None:
    assert ranks2.call(_sum_of_ranks) == [1.0, 1.0]
    pids = ranks2.call(_pid)
    assert pids == ranks2.pids
    assert ranks2.call(_sum_of_ranks) == [1.0, 1.0]
    assert ranks2.call(_pid) == pids


def test_error_shows_the_cause_and_recycles(ranks2: RankGroup) -> None:
    pids = ranks2.call(_pid)
    with pytest.raises(RankError, match="rank 1 of 2: LookupError: the real cause"):
        ranks2.call(_fail_on, 1)
    assert not ranks2.pids
    assert ranks2.call(_sum_of_ranks) == [1.0, 1.0]
    assert not set(pids) & set(ranks2.pids)


def _fail_everywhere() -> None:
    _sum_of_ranks()
    raise LookupError(f"on rank {dist.get_rank()}")


def _fail_apart() -> None:
    """Rank 0 is a collective ahead."""
    _sum_of_ranks()
    if dist.get_rank() == 0:
        dist.barrier(async_op=True)
    raise LookupError(f"on rank {dist.get_rank()}")


def test_ranks_that_all_fail_stay(ranks2: RankGroup) -> None:
    pids = ranks2.call(_pid)
    with pytest.raises(RankError, match=r"LookupError: on rank \d"):
        ranks2.call(_fail_everywhere)
    assert ranks2.call(_sum_of_ranks) == [1.0, 1.0]
    assert ranks2.call(_pid) == pids


def test_ranks_that_fail_out_of_step_are_replaced(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="LookupError"):
        ranks2.call(_fail_apart)
    assert not ranks2.pids
    assert ranks2.call(_sum_of_ranks) == [1.0, 1.0]


def test_hang_is_a_failure_with_the_stack(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2: Hang.*_hang_on"):
        ranks2.call(_hang_on, 1, timeout_seconds=2)


def test_exit_is_a_failure(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="ended with exit code 7"):
        ranks2.call(_exit_on, 1)
