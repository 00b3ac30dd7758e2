"""Ranks that wait for others say for whom."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from lightning_hybrid.launch import processes
from lightning_hybrid.launch.processes import meet
from lightning_hybrid.spec.errors import RankError
from tests.harness import free_port


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_QUIET_SECONDS", 0.1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def test_rank_0_names_the_missing_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError, match=r"ranks 1-3 have not come within 0:00:01"):
        meet(LightningEnvironment(), 0, 4, timedelta(seconds=1), {}, lambda: None)
    text = capsys.readouterr().err
    assert re.match(r"Waiting for ranks 1-3: 1 of 4 ranks are here, on \S+\. The run ends .* within 0:00:01", text)
    assert text.count("Waiting") == 1


@pytest.mark.parametrize("local_rank", [0, 1])
def test_another_node_names_the_address_of_rank_0(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], local_rank: int
) -> None:
    """The first rank of a node speaks for the node; torch prints to the file descriptor."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    environment = LightningEnvironment()
    place = f"127.0.0.1:{environment.main_port}"
    with pytest.raises(RankError, match=f"cannot reach rank 0 at {place}"):
        meet(environment, 2, 4, timedelta(seconds=1), {}, lambda: None)
    text = capfd.readouterr().err
    assert (f"Rank 2 of 4 waits for rank 0 at {place} (MASTER_ADDR, MASTER_PORT)." in text) == (local_rank == 0)


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([1, 2], "ranks 1, 2"), ([0, 2, 3, 4, 9], "ranks 0, 2-4, 9")]
)
def test_ranks_in_words(ranks: list[int], text: str) -> None:
    assert processes._named(ranks) == text
