"""Every hook sees the parameters of the whole model: it changes them as on one process, or is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed.contract.hook_jobs import (
    add_noise,
    add_noise_by_groups,
    halve_queries,
    read,
    read_by_groups,
    read_fused,
    run,
    train,
)
from tests.distributed.contract.test_weights_in_hooks import compare as compare_weights
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
    compare_weights(expected, found)
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


@pytest.mark.feature("hooks that change the parameters in optimizers")
@pytest.mark.parametrize(
    ("layout", "hook"),
    quick(
        itertools.product(["fsdp2", "tp2", "pp2"], ["on_before_optimizer_step", "on_train_batch_end"]),
        ("pp2", "on_train_batch_end"),
    ),
)
def test_groups_of_optimizers_have_all_parameters(ranks2: RankGroup, layout: str, hook: str) -> None:
    compare(
        train(None, hook, add_noise_by_groups, "Whole"), ranks2.call(train, layout, hook, add_noise_by_groups, "Whole")
    )


@pytest.mark.slow
def test_values_of_other_stages_in_groups_are_refused(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"a hook needs one of another stage: .*hook_jobs.py:\d+"):
        ranks2.call(train, "pp2", "on_train_batch_end", read_by_groups, "Whole")


@pytest.mark.feature("hooks that read or change weights of experts")
@pytest.mark.parametrize(
    ("do", "hook"),
    quick(
        itertools.product([read, read_by_groups, add_noise], ["on_after_backward", "on_train_batch_end"]),
        (read_by_groups, "on_after_backward"),
        (add_noise, "on_train_batch_end"),
    ),
)
def test_weights_of_experts_are_whole(ranks2: RankGroup, do, hook: str) -> None:
    compare(train(None, hook, do, "Mixture"), ranks2.call(train, "ep2", hook, do, "Mixture"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2-ep2", "ep2-tp2", "ep2-pp2", "ep4"])
def test_weights_of_experts_change_in_products(ranks4: RankGroup, layout: str) -> None:
    expected = train(None, "on_train_batch_end", add_noise, "Mixture")
    compare(expected, ranks4.call(train, layout, "on_train_batch_end", add_noise, "Mixture"))


@pytest.mark.feature("hooks that read weights whose order ranks of `tp` change")
def test_order_of_a_fused_weight_is_that_of_the_model(ranks2: RankGroup) -> None:
    compare(
        train(None, "on_train_batch_end", read_fused, "Fused"),
        ranks2.call(train, "tp2", "on_train_batch_end", read_fused, "Fused"),
    )


@pytest.mark.feature("hooks that use positions in weights whose order ranks of `tp` change", refused=True)
def test_positions_in_a_fused_weight_are_refused(ranks2: RankGroup) -> None:
    with pytest.raises(
        RankError,
        match=r"hook_jobs.py:\d+ \(halve_queries\) computes with elements of `model.transformer.h.0.attn.c_attn",
    ):
        ranks2.call(train, "tp2", "on_train_batch_end", halve_queries, "Fused")
