"""Every hook sees the parameters of the whole model: it changes them as on one process, or is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed.contract.hook_jobs import add_noise, read, run
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

HOOKS = (
    "on_fit_start",
    "on_validation_batch_start",
    "on_validation_model_train",
    "on_test_start",
    "on_test_batch_end",
    "on_predict_epoch_end",
    "lr_scheduler_step",
    "optimizer_step",
)


def compare(expected: dict[str, torch.Tensor], found: list[dict[str, torch.Tensor]]) -> None:
    """Compares weights of rank 0, and what every rank has read, with those of one process."""
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for rank in found:
        torch.testing.assert_close(rank["seen"], expected["seen"])


@pytest.mark.feature("any hook that changes weights")
@pytest.mark.parametrize(
    ("layout", "hook"),
    quick(
        itertools.product(["dp2", "fsdp2", "tp2", "pp2"], HOOKS),
        ("fsdp2", "on_test_batch_end"),
        ("tp2", "on_validation_batch_start"),
        ("pp2", "optimizer_step"),
    ),
)
def test_hooks_change_weights_as_on_one_process(ranks2: RankGroup, layout: str, hook: str) -> None:
    compare(run(None, hook, add_noise), ranks2.call(run, layout, hook, add_noise))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "pp2"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_test_end", "on_predict_batch_end"])
def test_hooks_of_callbacks(ranks2: RankGroup, layout: str, hook: str) -> None:
    compare(run(None, hook, add_noise, callback=True), ranks2.call(run, layout, hook, add_noise, callback=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "tp2"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_read_all_weights(ranks2: RankGroup, layout: str, hook: str) -> None:
    compare(run(None, hook, read), ranks2.call(run, layout, hook, read))


@pytest.mark.feature("any hook that reads weights of all stages", refused=True)
@pytest.mark.parametrize(
    ("layout", "hook"), quick(itertools.product(["pp2"], HOOKS), ("pp2", "optimizer_step"), ("pp2", "on_test_start"))
)
def test_hooks_that_need_values_of_other_stages_are_refused(ranks2: RankGroup, layout: str, hook: str) -> None:
    with pytest.raises(
        RankError, match=r"a hook needs one of another stage: .*hook_jobs.py:\d+ \(.*\) reads the value"
    ):
        ranks2.call(run, layout, hook, read)
