"""What users do with gradients between backward pass and update is the same under every layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.distributed.engine import gradient_jobs as jobs
from tests.distributed.reference import reference
from tests.harness import RankGroup
from tests.pairwise import in_turn, quick, slow

TWO = ["dp2", "fsdp2", "tp2", "pp2"]
FEATURE = "`param.grad` in `on_after_backward` and `on_before_optimizer_step`"


def group_of(request: pytest.FixtureRequest, layout: str) -> RankGroup:
    return request.getfixturevalue("ranks4" if "-" in layout else "ranks2")


def check_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=name)


def check_gradients(results: list[dict], expected: list[tuple[str, dict[str, torch.Tensor]]]) -> None:
    """Every rank sees its part of one process's gradients, by name, and together they see all."""
    for result in results:
        assert [hook for hook, _ in result["found"]] == [hook for hook, _ in expected]
    for i, (hook, gradients) in enumerate(expected):
        for result in results:
            for name, value in result["found"][i][1].items():
                torch.testing.assert_close(value, gradients[name], rtol=1e-5, atol=1e-6, msg=f"{hook}, {name}")
        assert set().union(*(r["found"][i][1] for r in results)) == set(gradients)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("layout", "accumulate"),
    quick(itertools.product([*TWO, "fsdp2-pp2", "dp2-pp2"], [1, 3]), ("fsdp2", 3), ("tp2", 1), ("pp2", 3)),
)
def test_reading_gradients(request, layout, accumulate):
    options: dict[str, Any] = {"gradient_clip_val": 0.05, "accumulate_grad_batches": accumulate}
    expected = reference(jobs.with_gradients, None, {}, **options)
    results = group_of(request, layout).call(jobs.with_gradients, layout, {}, **options)
    check_gradients(results, expected["found"])
    check_weights(results[0]["weights"], expected["weights"])


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("layout", "accumulate", "where"),
    quick(
        itertools.product([*TWO, "fsdp2-pp2", "dp2-pp2"], [1, 3], ["on_after_backward", "on_before_optimizer_step"]),
        ("dp2", 3, "on_before_optimizer_step"),
        ("fsdp2", 1, "on_before_optimizer_step"),
        ("tp2", 1, "on_after_backward"),
        ("pp2", 3, "on_after_backward"),
        ("fsdp2-pp2", 3, "on_before_optimizer_step"),
    ),
)
def test_changing_gradients(request, layout, accumulate, where):
    change = {"factor": 0.5, "where": where}
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    expected = reference(jobs.with_gradients, None, change, **options)
    results = group_of(request, layout).call(jobs.with_gradients, layout, change, **options)
    check_gradients(results, expected["found"])
    check_weights(results[0]["weights"], expected["weights"])


@pytest.mark.parametrize("tied", ["trained", slow("frozen")])
@pytest.mark.parametrize("layout", ["pp2", slow("fsdp2-pp2")])
def test_a_weight_of_several_stages(request, layout, tied):
    change: dict[str, Any] = {"factor": 0.5, "where": "on_after_backward"}
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "tied": tied}
    expected = reference(jobs.with_gradients, None, change, **options)
    results = group_of(request, layout).call(jobs.with_gradients, layout, change, **options)
    check_gradients(results, expected["found"])
    check_weights(results[0]["weights"], expected["weights"])


@pytest.mark.parametrize("layout", [slow("dp2"), "pp2"])
def test_a_callback_of_one_rank(ranks2: RankGroup, layout):
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "alone": True}
    results = ranks2.call(jobs.with_gradients, layout, {}, **options)
    check_weights(results[0]["weights"], reference(jobs.with_gradients, None, {}, **options)["weights"])


@pytest.mark.feature("gradient norms (`strategy.gradient_norms`)")
@pytest.mark.parametrize(
    ("layout", "optimizer"),
    quick(
        itertools.product([*TWO, "dp2-pp2", "fsdp2-pp2", "tp2-pp2", "fsdp2-tp2", "dp2-fsdp2"], ["sgd", "head"]),
        ("dp2", "head"),
        ("fsdp2", "sgd"),
        ("tp2", "head"),
        ("pp2", "sgd"),
        ("tp2-pp2", "sgd"),
    ),
)
def test_norms_of_gradients(request, layout, optimizer):
    expected = reference(jobs.norms_of_gradients, None, {"optimizer": optimizer})
    assert len(expected["found"][0]) == (3 if optimizer == "head" else 21)
    for result in group_of(request, layout).call(jobs.norms_of_gradients, layout, {"optimizer": optimizer}):
        for found, norms in zip(result["found"], expected["found"], strict=True):
            assert found == pytest.approx(norms, rel=1e-4)
        assert result["logged"] == pytest.approx(expected["logged"], rel=1e-4)


def test_a_weight_of_several_stages_counts_once_in_the_norm(ranks2: RankGroup):
    options: dict[str, Any] = {"tied": True, "gradient_clip_val": 0.05}
    expected = reference(jobs.norms_of_gradients, None, {}, **options)
    results = ranks2.call(jobs.norms_of_gradients, "pp2", {}, **options)
    for found, norms in zip(results[0]["found"], expected["found"], strict=True):
        assert found == pytest.approx(norms, rel=1e-4)
    check_weights(results[0]["weights"], expected["weights"])


HOOKS = ["", "clips twice", "halves", "looks on rank 0"]


@pytest.mark.parametrize(
    ("layout", "hook"),
    quick(itertools.product(TWO, HOOKS), *in_turn(TWO, HOOKS)),
)
def test_gradients_are_measured_again_only_after_a_hook(ranks2: RankGroup, layout, hook):
    expected = reference(jobs.clipped, None, hook)
    times = {"": 1, "clips twice": 3}.get(hook, 2)  # the check for NaN, and what hooks make necessary on any rank
    results = ranks2.call(jobs.clipped, layout, hook)
    assert [len(result["measured"]) for result in results] == [times * 3] * 2
    check_weights(results[0]["weights"], expected["weights"])


@pytest.mark.feature("`optimizer.add_param_group` during training")
@pytest.mark.parametrize(
    ("layout", "save"),
    quick(itertools.product([*TWO, "fsdp2-pp2"], [True, False]), ("fsdp2", False), ("tp2", True), ("pp2", False)),
)
def test_an_added_parameter_group(request, tmp_path, layout, save):
    expected = reference(jobs.with_an_added_group, None)
    path = str(tmp_path / "added.ckpt") if save else None
    results = group_of(request, layout).call(jobs.with_an_added_group, layout, save=path)
    check_weights(results[0]["weights"], expected["weights"])
    names = list(expected["weights"])
    body, head = [n for n in names if not n.startswith("head")], ["head.weight", "head.bias"]
    assert all(r["groups"] == [head, body] for r in results)
