"""On one GPU: as fast as Lightning's single-device strategy, with the same losses; and ranks that share it are exact.

The comparisons themselves are also run on the CPU with a tiny model, where there is nothing to say about speed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from tests.benchmarks.contestants import Size
from tests.gpu.shared_device import train
from tests.gpu.single_device import HALF_BILLION, PEAK_BF16_FLOPS, Setup, Speed, compare, flops_per_step
from tests.harness import RankGroup
from tests.zoo.reference import compare as compare_runs

BOUND = 1.02
"""Step time of `HybridStrategy` on one device over that of `SingleDeviceStrategy`."""
SAME_LOSS = 2**-7
"""Relative: one spacing of bfloat16."""
ROUNDS, STEPS = 12, 10
TIMEOUT_SECONDS = 500.0
TINY = Size(vocabulary=64, width=32, blocks=2, heads=2, time=16, batch=4)

on_gpu = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch.cuda.is_available() is False"),
]


@pytest.fixture
def rank() -> Iterator[RankGroup]:
    """One process, which makes a process group of its own."""
    with RankGroup(1, timeout_seconds=TIMEOUT_SECONDS) as group:
        yield group


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankGroup]:
    """Two processes, neither of which has used a GPU yet."""
    with RankGroup(2, timeout_seconds=120) as group:
        yield group


class TestSingleDevice:
    @pytest.mark.parametrize(
        "compiled", [pytest.param(c, id=i, marks=on_gpu) for c, i in ((False, "eager"), (True, "compiled"))]
    )
    def test_step_takes_as_long_as_with_single_device_strategy(
        self, rank: RankGroup, compiled: bool, capsys: pytest.CaptureFixture
    ) -> None:
        setup = Setup(device="cuda", size=HALF_BILLION, compile=compiled)
        speed: Speed = rank.call(compare, setup, ROUNDS, STEPS)[0]
        with capsys.disabled():
            name = torch.cuda.get_device_name()
            sys.stdout.write(f"\n{name}, bf16, {'compiled' if compiled else 'eager'}: {speed.report()}\n")
        assert speed.result.loss_difference <= SAME_LOSS
        assert speed.result.ratio <= BOUND, speed.report()

    @pytest.mark.distributed
    def test_comparison_runs_on_the_cpu(self, rank: RankGroup) -> None:
        setup = Setup(device="cpu", size=TINY, precision="32-true")
        speed: Speed = rank.call(compare, setup, 2, 2)[0]
        assert speed.result.loss_difference == 0
        assert len(speed.result.ratios) == 2
        assert "TFLOP/s" in speed.report()


class TestSharedDevice:
    @pytest.mark.parametrize("layout", ["dp2", "fsdp2", "tp2", "pp2"])
    @pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
    def test_ranks_on_one_gpu_train_as_one_process(
        self, rank: RankGroup, two_ranks: RankGroup, layout: str, device: str
    ) -> None:
        _check(rank, two_ranks, layout, device)

    @pytest.mark.distributed
    def test_pipeline_is_exact_with_sends_over_the_host(self, rank: RankGroup, two_ranks: RankGroup) -> None:
        _check(rank, two_ranks, "pp2", "cpu")


def _check(rank: RankGroup, two_ranks: RankGroup, layout: str, device: str) -> None:
    single = rank.call(train, None, device)[0]
    comparison = compare_runs(single, two_ranks.call(train, layout, device))
    assert not comparison.problems, comparison


@pytest.mark.unit
class TestFlops:
    def test_half_a_billion_weights_at_six_flops_each(self) -> None:
        tokens = HALF_BILLION.batch * HALF_BILLION.time
        assert 6 * 0.45e9 * tokens < flops_per_step(HALF_BILLION) < 8 * 0.55e9 * tokens

    def test_peak_of_an_h100_is_that_without_sparsity(self) -> None:
        assert PEAK_BF16_FLOPS["NVIDIA H100 80GB HBM3"] == 989e12
