"""`HybridMonitor` logs what it says, and what it says is so."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.distributed.callbacks import monitor_jobs as jobs
from tests.distributed.callbacks.monitor_jobs import BATCH, PEAK_TFLOPS, SLOW_SECONDS, TIME
from tests.harness import RankGroup
from tests.pairwise import quick

PARTS = ("computation", "communication", "bubble", "data_wait", "other")


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "dp2", "pp2"))
def test_values_are_those_of_the_run(ranks2: RankGroup, layout: str) -> None:
    expected = jobs.of_one_process()
    found = ranks2.call(jobs.fit, layout, monitor={"peak_tflops": PEAK_TFLOPS})
    first, last = found[0]["lines"]
    assert found[1]["values"] == found[0]["values"], "all ranks compute the same values"
    assert [line["step"] for line in (first, last)] == [3, 7]
    rate = last["throughput/samples_per_second"]
    assert last["throughput/tokens_per_second"] == pytest.approx(rate * TIME)
    assert last["throughput/tokens_per_second_per_device"] == pytest.approx(rate * TIME / 2)
    assert last["throughput/steps_per_second"] == pytest.approx(rate / BATCH)
    assert last["batch/global_samples"] == BATCH
    assert last["batch/global_tokens"] == BATCH * TIME
    tflops = last["throughput/tflops_per_device"]
    assert tflops * 2e12 / rate == pytest.approx(expected["flops"]), "operations of a sample, as torch counts them"
    assert last["throughput/mfu"] == pytest.approx(tflops / PEAK_TFLOPS)
    assert [line["gradient_norm"] for line in (first, last)] == pytest.approx(
        [expected["norms"][step] for step in (3, 7)], rel=1e-4
    )
    assert last["time/step"] * last["throughput/steps_per_second"] == pytest.approx(1, rel=0.05)
    assert sum(last[f"time/{part}"] for part in PARTS) == pytest.approx(last["time/step"])
    assert all(last[f"time/{part}"] >= 0 for part in PARTS)
    assert last["time/computation"] > 0
    assert last["time/communication"] > 0
    assert last["memory/peak_mib"] == max(last["memory/peak_mib_rank0"], last["memory/peak_mib_rank1"]) > 50
    assert last[f"layout/{layout[:-1]}"] == 2
    if layout == "pp2":
        assert last["bubble/predicted"] == found[0]["bubble"] > 0
        assert 0 < last["bubble/measured"] < 1
        shares = [(last[f"stages/share_{s}"], last[f"stages/share_{s}_predicted"]) for s in (0, 1)]
        assert [sum(column) for column in zip(*shares, strict=True)] == pytest.approx([1, 1])
    else:
        assert last["time/bubble"] == 0


@pytest.mark.slow
def test_time_is_charged_to_what_takes_it(ranks2: RankGroup) -> None:
    """A loader, a replica, a rank of `tp` or a stage that is slow by a known time."""

    def last(layout: str, **options: Any) -> dict[str, float]:
        return ranks2.call(jobs.fit, layout, **options)[0]["lines"][-1]

    waits = last("dp2", seconds_per_sample=SLOW_SECONDS / 8)
    assert waits["time/data_wait"] > 0.9 * SLOW_SECONDS
    replica = last("dp2", slow_ranks=(1,))
    assert replica["time/communication"] > 0.4 * SLOW_SECONDS, "rank 0 waits for the gradients of rank 1"
    assert replica["time/computation_slowest_rank"] > 0.9 * SLOW_SECONDS
    assert replica["time/computation"] < 0.9 * replica["time/computation_slowest_rank"]
    for layout in ("tp2", "fsdp2"):
        inside = last(layout, slow_ranks=(1,))
        assert inside["time/communication"] > 0.3 * SLOW_SECONDS, "rank 0 waits within the passes"
    stage = last("pp2", slow_ranks=(1,))
    assert stage["bubble/measured"] > 0.3, "stage 0 waits for stage 1"
    assert stage["stages/share_1"] > 0.9


@pytest.mark.slow
def test_the_bubble_of_equal_stages_is_that_of_the_schedule(ranks2: RankGroup) -> None:
    """Two stages, each 0.1 s for a microbatch, and 4 microbatches: a stage waits for one of the five intervals."""
    seconds = 2 * SLOW_SECONDS
    last = ranks2.call(jobs.fit, "pp2", slow_stages=seconds, microbatches=4)[0]["lines"][-1]
    assert last["bubble/predicted"] == pytest.approx(1 / 5)
    assert last["bubble/measured"] == pytest.approx(1 / 5, abs=0.05)
    assert [last[f"stages/share_{stage}"] for stage in (0, 1)] == pytest.approx([0.5, 0.5], abs=0.05)
    assert last["time/step"] == pytest.approx(5 * seconds, rel=0.25)
    assert last["time/computation"] == pytest.approx(4 * seconds, rel=0.25)
    assert last["time/bubble"] == pytest.approx(seconds, rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_recomputation_is_no_use_of_the_model(ranks2: RankGroup, layout: str) -> None:
    expected = jobs.of_one_process()["flops"]
    last = ranks2.call(jobs.fit, layout, checkpointing=True)[0]["lines"][-1]
    rate = last["throughput/samples_per_second"]
    assert last["throughput/tflops_per_device"] * 2e12 / rate == pytest.approx(expected)
    again = 4 * 2 * TIME * jobs.WIDTH**2  # the forward passes of the blocks
    assert last["throughput/hardware_tflops_per_device"] * 2e12 / rate == pytest.approx(expected + again)


@pytest.mark.slow
def test_operations_of_compiled_code_are_not_counted(ranks2: RankGroup) -> None:
    found = ranks2.call(jobs.fit, "dp2", compiled=True)[0]
    assert found["lines"][-1]["throughput/tokens_per_second"] > 0
    assert not [key for key in found["lines"][-1] if "flops" in key or "mfu" in key]
    assert found["told"] == 1, "once, not for every batch"


@pytest.mark.slow
def test_nothing_is_said_of_what_is_not_known(ranks2: RankGroup) -> None:
    last = ranks2.call(jobs.fit, "dp2", monitor={"tokens": None, "count_flops": False})[0]["lines"][-1]
    assert last["throughput/samples_per_second"] > 0
    unknown = ("tokens", "flops", "mfu", "bubble/", "stages/", "experts/", "noise")
    assert not [key for key, word in itertools.product(last, unknown) if word in key]
