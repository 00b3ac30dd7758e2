"""Operations, samples and tokens of `HybridMonitor` are those that one counts by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed.callbacks import count_jobs as jobs
from tests.distributed.callbacks.monitor_jobs import TIME
from tests.harness import RankGroup
from tests.pairwise import quick

EVERYWHERE = {
    *(f"throughput/{unit}_per_second{per}" for unit in ("samples", "tokens") for per in ("", "_per_device")),
    *(f"time/{part}" for part in ("step", "computation", "communication", "bubble", "data_wait", "other")),
    *(f"memory/{peak}" for peak in ("peak_mib", "peak_mib_rank0", "peak_mib_rank1")),
    *(f"events/{kind}" for kind in ("relayout", "phase", "batch_size", "rebalancing")),
    *("gradient_norm", "batch/global_samples", "time/computation_slowest_rank", "throughput/steps_per_second"),
}
"""Keys that are logged in every layout."""


def operations_of_a_token(experts: bool) -> int:
    """Multiplications and additions of a token in the forward and the backward pass of the quickstart's model.

    A weight has 2 in the forward pass and 4 in the backward pass, for the gradients of the input and of the weight.
    Attention has two products of T by the width in the forward pass, and five in the backward pass of the fused kernel,
    which computes the scores again. Causal masks do not count.
    """
    shape = jobs.quickstart_shape()
    width, hidden, blocks = shape.width, shape.feed_forward_width, shape.blocks
    assert (width, blocks, shape.context_length) == (128, 4, 128)
    attention = 4 * width * width
    feed_forward = [3 * width * hidden] * blocks
    if experts:
        chosen = jobs.EXPERTS.chosen + jobs.EXPERTS.shared
        routed = width * jobs.EXPERTS.experts + chosen * 3 * width * jobs.EXPERTS.hidden
        feed_forward[1:] = [routed] * (blocks - 1)
    weights = blocks * attention + sum(feed_forward) + width * shape.vocabulary
    scores = blocks * (2 + 5) * 2 * shape.context_length * width
    return 6 * weights + scores


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2", "ep2"], "tp2"))
def test_operations_of_the_quickstart(ranks2: RankGroup, layout: str) -> None:
    """Summed over the ranks they are those of one process, under every axis."""
    (last,) = ranks2.call(jobs.quickstart, layout)[0]
    tokens = last["throughput/tokens_per_second"]
    assert last["batch/global_tokens"] == jobs.BATCH * 128
    found = last["throughput/tflops_per_device"] * 2e12 / tokens
    assert found == pytest.approx(operations_of_a_token(experts=layout == "ep2"), rel=1e-6)
    assert last["throughput/mfu"] == pytest.approx(last["throughput/tflops_per_device"])  # of 1 TFLOP/s
    assert last.keys() >= EVERYWHERE
    assert [last[f"layout/{axis}"] for axis in ("dp", "fsdp", "tp", "pp", "ep")].count(2) == 1
    assert last[f"layout/{layout[:-1]}"] == 2
    assert ("bubble/measured" in last) == ("bubble/predicted" in last) == (layout == "pp2")
    assert ("experts/max_over_mean" in last) == (layout == "ep2")


def _logged(found: list[dict[str, Any]], replicas: int, every: int) -> list[dict[str, float]]:
    """Shows that what was logged is what the loaders of the replicas gave; returns the lines."""
    ranks = found[:: len(found) // replicas]
    samples, tokens = ([sum(of_step) for of_step in zip(*(r[name] for r in ranks), strict=True)] for name in jobs.UNITS)
    for line in found[0]["lines"]:
        step = line["step"]
        assert line["batch/global_samples"] == samples[step]
        assert line["batch/global_tokens"] == tokens[step]
    for line in found[0]["lines"][1:]:  # the first window begins after the steps that warm up
        step, steps = line["step"], line["throughput/steps_per_second"]
        window = slice(step + 1 - every, step + 1)
        assert line["throughput/samples_per_second"] / steps * every == pytest.approx(sum(samples[window]))
        assert line["throughput/tokens_per_second"] / steps * every == pytest.approx(sum(tokens[window]))
        assert line["throughput/tokens_per_second_per_device"] * 2 == line["throughput/tokens_per_second"]
    return found[0]["lines"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("layout", "samples"), quick([("dp2", 33), ("dp2", 35), ("tp2", 35), ("pp2", 35)], ("dp2", 33))
)
def test_tokens_of_uneven_batches(ranks2: RankGroup, layout: str, samples: int, accumulate: int) -> None:
    """Batches of 16, 16 and what is left; with 33 samples a replica of `dp2` has nothing left."""
    every = accumulate + 1  # so that steps of one batch and of several are logged
    found = ranks2.call(jobs.uneven, layout, samples, accumulate, every)
    lines = _logged(found, 2 if layout == "dp2" else 1, every)
    batches = [16, 16, samples - 32]
    of_steps = [sum(batches[i : i + accumulate]) for i in range(0, 3, accumulate)] * 6
    assert len(lines) == len(of_steps) // every
    assert [line["batch/global_samples"] for line in lines] == [float(n) for n in of_steps[every - 1 :: every]]
    assert [line["batch/global_tokens"] for line in lines] == [float(n * TIME) for n in of_steps[every - 1 :: every]]
    assert sum(sum(rank["samples"]) for rank in found) == 6 * samples * (1 if layout == "dp2" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_tokens_of_batches_of_other_lengths(ranks2: RankGroup, layout: str) -> None:
    found = ranks2.call(jobs.uneven, layout, 35, 1, 2, cut=True)
    lines = _logged(found, 2 if layout == "dp2" else 1, 2)
    lengths = {line["batch/global_tokens"] / line["batch/global_samples"] for line in lines}
    assert len(lengths) > 1
    assert all(math.isfinite(length) for length in lengths)
