"""What crosses pipeline stages, and how batches are split: training under a layout equals one process."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from lightning_hybrid import Layout
from tests.distributed.engine import value_modules
from tests.distributed.engine.value_modules import loader_of
from tests.distributed.jobs import quiet, verified_trainer_for, weights
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

BATCHES = (
    "Lists", "Targets", "OnGraphs", "BesideTensor", "OnPairs", "OnEncodings", "Packed", "Sparse", "Views", "Tasks",
)  # fmt: skip
SENT = ("Complex", "Subtracted", "Residual", "Skips", "Written", "WithTeacher")
NUMBERS = ("Number", "SideDoor", "OfBlocks")
BACKWARD = ("Scaled", "Penalized", "Twice", "Never")


def fit(layout: str | None, kind: str, options: dict[str, Any] | None = None, **trainer_options: Any) -> dict[str, Any]:
    """Trains a module of `value_modules`; its weights and the loss of each epoch."""
    quiet()
    L.seed_everything(7, verbose=False)
    made = getattr(value_modules, kind)
    module = made()
    trainer, replicas = verified_trainer_for(layout, strategy_options=options, **{"max_epochs": 3, **trainer_options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*could not be checked: the batch cannot be split")  # with replicas
        trainer.fit(module, loader_of(made, 8 // replicas))
    return {"weights": weights(trainer, module), "losses": module.losses}


@functools.cache
def expected_of(kind: str, **trainer_options: Any) -> dict[str, Any]:
    return fit(None, kind, **trainer_options)


def check(
    request: pytest.FixtureRequest, layout: str, kind: str, options: dict[str, Any] | None = None, **trainer: Any
) -> None:
    ranks: RankGroup = request.getfixturevalue("ranks2" if Layout.parse(layout).devices == 2 else "ranks4")
    found, expected = ranks.call(fit, layout, kind, options, **trainer), expected_of(kind, **trainer)
    for result in found:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4, abs=1e-6)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def refusal(ranks: RankGroup, layout: str, kind: str, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(RankError) as error:
        ranks.call(fit, layout, kind, options)
    assert error.value.kind == "PartitionError", error.value
    return str(error.value)


LAYOUTS = ["pp2", "dp2-pp2", "dp2", "fsdp2"]


@pytest.mark.feature("batches of any structure")
@pytest.mark.parametrize(("kind", "layout"), quick([(k, y) for k in BATCHES for y in LAYOUTS], ("Targets", "pp2")))
def test_batches_of_any_structure(request: pytest.FixtureRequest, layout: str, kind: str) -> None:
    check(request, layout, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["OnGraphs", "Packed", "Targets"])
def test_one_microbatch_has_the_whole_batch(request: pytest.FixtureRequest, kind: str) -> None:
    check(request, "pp2", kind, {"microbatches": 1})


def test_microbatches_of_a_batch_that_cannot_be_split_are_refused(ranks2: RankGroup) -> None:
    text = refusal(ranks2, "pp2", "BesideTensor", {"microbatches": 2})
    assert "`microbatches=2` cannot split the batches into samples: `batch['graph'].nodes` has" in text


@pytest.mark.feature("values between stages: complex, of code outside modules, in tensors that blocks write")
@pytest.mark.parametrize(
    ("kind", "layout"), quick([(k, y) for k in SENT for y in ("pp2", "dp2-pp2")], ("Skips", "pp2"))
)
def test_values_between_stages(request: pytest.FixtureRequest, layout: str, kind: str) -> None:
    check(request, layout, kind)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"microbatches": 1}, {"microbatches": 2}, {"schedule": "Interleaved1F1B"}])
@pytest.mark.parametrize("kind", SENT)
def test_values_between_stages_with_any_schedule(
    request: pytest.FixtureRequest, kind: str, options: dict[str, Any]
) -> None:
    check(request, "pp2", kind, options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Skips", "Written"])
def test_values_between_stages_with_a_zero_bubble_schedule(request: pytest.FixtureRequest, kind: str) -> None:
    check(request, "pp2", kind, {"schedule": "ZBVZeroBubble"})


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2", "fsdp2"])
def test_complex_weights(request: pytest.FixtureRequest, layout: str) -> None:
    check(request, layout, "Complex", gradient_clip_val=0.1)


@pytest.mark.slow
def test_other_operations_in_a_later_step_are_refused(ranks2: RankGroup) -> None:
    text = refusal(ranks2, "pp2", "Deviating")
    assert "The step has called `mul` 1 times" in text
    assert "and 2 times now" in text


@pytest.mark.feature("numbers that modules return or leave in attributes")
@pytest.mark.parametrize(
    ("kind", "layout"), quick([(k, y) for k in NUMBERS for y in ("pp2", "dp2-pp2")], ("SideDoor", "pp2"))
)
def test_numbers_that_modules_tell(request: pytest.FixtureRequest, layout: str, kind: str) -> None:
    check(request, layout, kind)


@pytest.mark.slow
def test_numbers_computed_from_tensors_are_refused(ranks2: RankGroup) -> None:
    assert "`blocks.0` reads values of tensors, and tells later code numbers" in refusal(ranks2, "pp2", "OfValues")


@pytest.mark.feature("`backward` of the module")
@pytest.mark.parametrize(
    ("kind", "layout"),
    quick([(k, y) for k in BACKWARD for y in ("pp2", "dp2-pp2", "fsdp2-pp2")], ("Penalized", "pp2")),
)
@pytest.mark.parametrize("batches", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_backward_of_the_module(request: pytest.FixtureRequest, layout: str, kind: str, batches: int) -> None:
    if (kind, layout) in (("Twice", "fsdp2-pp2"), ("Penalized", "fsdp2-pp2")):
        pytest.skip("refused: see below")
    if kind == "Scaled" and "dp2" in layout:
        pytest.skip("scales by the loss of the replica, as DistributedDataParallel does")
    check(request, layout, kind, accumulate_grad_batches=batches)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "fsdp2-pp2"])
def test_what_a_backward_of_the_module_cannot_do_is_refused(request: pytest.FixtureRequest, layout: str) -> None:
    ranks: RankGroup = request.getfixturevalue("ranks2" if layout == "pp2" else "ranks4")
    kind = "PartOnly" if layout == "pp2" else "Twice"
    text = refusal(ranks, layout, kind)
    assert "value_modules.py" in text
    assert "`backward` runs the backward pass of" in text


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "schedule"), [("pp2", "1F1B"), ("pp4", "1F1B"), ("pp2", "DualPipeV")])
def test_a_first_stage_that_sends_nothing_of_a_module(
    request: pytest.FixtureRequest, layout: str, schedule: str
) -> None:
    check(request, layout, "Flat", {"schedule": schedule})


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2", "fsdp2-tp2"], "fsdp2"))
def test_parameters_that_are_no_floating_point_numbers(request: pytest.FixtureRequest, layout: str) -> None:
    check(request, layout, "Ordered")
