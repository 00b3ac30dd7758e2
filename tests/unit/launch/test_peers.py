"""What a rank finds out about the others: gone, silent on another machine, or left because their run is over."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from lightning_hybrid.launch.failures import Cause, failure_of
from lightning_hybrid.launch.peers import PeerMonitor
from lightning_hybrid.launch.processes import Process, RankGroup, this_process
from lightning_hybrid.launch.store import FailureStore

ELSEWHERE = Process("another machine", 1)


def _dead() -> Process:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return Process(this_process().host, process.pid)


def _peers(store: Store, *others: Process) -> PeerMonitor:
    group = RankGroup(store=store, rank=0, processes=[this_process(), *others], facts=[], rank0_has_store=True)
    return PeerMonitor(group, [], lambda: "training_step of batch 7")


def _kinds(peers: PeerMonitor) -> list[tuple[int, str]]:
    return [(f.rank, f.kind) for f in peers.failures]


def test_gone() -> None:
    store = HashStore()
    FailureStore(store, 1).beat("training_step of batch 6")
    peers = _peers(store, _dead(), ELSEWHERE)
    peers.poll()
    peers.poll()
    assert _kinds(peers) == [(1, "ended")]
    assert peers.failures[0].operation == "training_step of batch 6"


def test_left_is_not_gone() -> None:
    store = HashStore()
    FailureStore(store, 1).leave()
    peers = _peers(store, _dead())
    peers.poll()
    assert not peers.failures
    assert peers.leave()


def test_one_that_said_why_is_not_gone_without_a_word() -> None:
    store = HashStore()
    FailureStore(store, 1).post(failure_of(ValueError("bad"), 1, "setup"))
    peers = _peers(store, _dead())
    peers.poll()
    assert _kinds(peers) == [(1, "raised")]
    assert FailureStore(store, 0).answers(2)[0].operation == "training_step of batch 7"


@pytest.mark.parametrize(("a_connection_broke", "polls"), [(True, 13), (False, 123)])
def test_silence_of_another_machine(a_connection_broke: bool, polls: int) -> None:
    store = HashStore()
    peers = _peers(store, ELSEWHERE, ELSEWHERE)
    beats = [FailureStore(store, rank) for rank in (1, 2)]
    for i in range(5):
        beats[0].beat(f"{i}")
        beats[1].beat(f"{i}")
        peers.poll()
    if a_connection_broke:
        beats[1].post(failure_of(RuntimeError("gloo/transport: Connection closed by peer"), 2, "backward"))
    for i in range(polls):
        beats[1].beat(f"{i} again")
        assert (1, "ended") not in _kinds(peers) or i > polls - 4
        peers.poll()
    assert (1, "ended") in _kinds(peers)
    assert (2, "ended") not in _kinds(peers)


def test_one_cause_and_one_reporter_for_all() -> None:
    store = HashStore()
    causes = [Cause(kind="ended", rank=r, text=str(r), reporter=None) for r in (0, 1)]
    stores = [FailureStore(store, r) for r in (0, 1)]
    assert stores[1].decide(lambda: causes[1]) == causes[1]
    assert stores[0].decide(lambda: causes[0]) == causes[1]
    assert [store.claim_report() for store in stores] == [True, False]


def test_quiet_ranks_leave_when_the_cause_has_been_reported() -> None:
    store = HashStore()
    peers = _peers(store, this_process(), _dead())
    assert not peers.has_reported(1)
    assert not peers.has_reported(None)
    assert peers.has_reported(2)  # its process is gone
    FailureStore(store, 1).note_reported()
    assert peers.has_reported(1)
    assert peers.has_reported(None)


def test_a_rank_without_a_store_waits_for_a_report_to_the_end() -> None:
    peers = _peers(HashStore(), this_process())
    peers.is_alone = True
    FailureStore(peers.group.store, 1).note_reported()
    assert not peers.has_reported(None)


@pytest.mark.parametrize("lose", [PeerMonitor.lose_store, PeerMonitor.decide_alone])
def test_the_first_rank_that_is_left_without_a_store_is_the_one_that_reports(lose: Any) -> None:
    """Also after it has ended, which it does as soon as it has reported."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as first:
        processes = [_dead(), Process(this_process().host, first.pid), this_process()]
        group = RankGroup(store=HashStore(), rank=2, processes=processes, facts=[], rank0_has_store=True)
        peers = PeerMonitor(group, [], lambda: "backward")
        lose(peers)
        assert peers.is_alone
        assert not peers.is_first
        first.communicate(b"\n")
    lose(peers)
    assert not peers.is_first
