"""Expert parallelism of a user's own experts: the numbers of one process, whatever is done around it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.experts import expert_jobs as jobs
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import quick, slow

LAYOUTS = ["ep2", "ep2-pp2", "ep2-tp2", "ep4", "fsdp2-ep2", "dp2-ep2"]
FEATURE = "mixture of experts under `ep`"
WHOLE = ["dp2", "fsdp2", "tp2", "pp2"]

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": ({"adamw": True}, {"gradient_clip_val": 0.05}),
    "accumulate": ({}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "lazy": ({"lazy": True, "adamw": True}, {}),
    "ranks without tokens": ({"favorite": True}, {}),
}
OFTEN = [
    ("fsdp2-ep2", "clip"),
    ("ep2-pp2", "accumulate"),
    ("ep2-tp2", "lazy"),
    ("ep2-tp2", "ranks without tokens"),
]
"""Each setting under one of the three products."""


def group_of(request: pytest.FixtureRequest, layout: str) -> RankGroup:
    return request.getfixturevalue("ranks4" if "-" in layout or "4" in layout else "ranks2")


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=2e-6, msg=name)
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(("layout", "setting"), quick(itertools.product(LAYOUTS, SETTINGS), *OFTEN))
def test_equal_to_one_process(request: pytest.FixtureRequest, layout: str, setting: str) -> None:
    module_options, options = SETTINGS[setting]
    results = group_of(request, layout).call(jobs.fit, layout, module_options, **options)
    check(results[0], reference(jobs.fit, None, module_options, **options))


@pytest.mark.parametrize("layout", ["ep2", slow("fsdp2-ep2"), slow("dp2-ep2")])
def test_manual_optimization_of_accumulated_batches(request: pytest.FixtureRequest, layout: str) -> None:
    options = {"manual": True, "accumulates": 3}
    check(group_of(request, layout).call(jobs.fit, layout, options)[0], reference(jobs.fit, None, options))


@pytest.mark.parametrize("layout", ["ep2", slow("fsdp2-ep2")])
def test_manual_optimization(request: pytest.FixtureRequest, layout: str) -> None:
    check(
        group_of(request, layout).call(jobs.fit, layout, {"manual": True})[0],
        reference(jobs.fit, None, {"manual": True}),
    )


@pytest.mark.parametrize("layout", ["ep2", slow("fsdp2-ep2")])
def test_uneven_last_batch(request: pytest.FixtureRequest, layout: str) -> None:
    check(group_of(request, layout).call(jobs.fit, layout, samples=45)[0], reference(jobs.fit, None, samples=45))


@pytest.mark.parametrize("layout", quick(["ep2", "ep2-pp2", "ep2-tp2", "fsdp2-ep2"], "ep2"))
def test_stream(request: pytest.FixtureRequest, layout: str) -> None:
    check(group_of(request, layout).call(jobs.fit, layout, stream=True)[0], reference(jobs.fit, None, stream=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ep2", "ep2-pp2"])
def test_compiled_blocks(request: pytest.FixtureRequest, layout: str) -> None:
    results = group_of(request, layout).call(
        jobs.fit, layout, strategy_options={"compile": True}, timeout_seconds=150.0
    )
    check(results[0], reference(jobs.fit, None))


@pytest.mark.parametrize("layout", quick(LAYOUTS, "ep2"))
def test_each_rank_holds_its_part_of_the_experts(request: pytest.FixtureRequest, layout: str) -> None:
    results = group_of(request, layout).call(jobs.fit, layout)
    sizes = {"ep2": 2, "ep2-pp2": 2, "ep2-tp2": 2, "ep4": 1, "fsdp2-ep2": 1, "dp2-ep2": 2}
    for result in results:
        local = {n: s for n, s in result["shapes"].items() if ".experts." in n}
        assert local
        assert {shape[0] for shape in local.values()} == {sizes[layout]}
    # what is no expert's is sharded over all data-parallel ranks where `fsdp` shards at all, else whole
    assert results[0]["shapes"]["blocks.0.router.weight"][0] == (1 if layout.startswith("fsdp") else jobs.EXPERTS)


@pytest.mark.parametrize("layout", quick(LAYOUTS, "ep2-tp2"))
def test_loads_and_gradient_norms_are_those_of_one_process(request: pytest.FixtureRequest, layout: str) -> None:
    results, expected = group_of(request, layout).call(jobs.fit, layout), reference(jobs.fit, None)
    for result in results:
        assert result["loads"] == expected["loads"]
        for found, norms in zip(result["norms"], expected["norms"], strict=True):
            assert found == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("layout", quick(["ep2", "fsdp2-ep2", "ep2-pp2"], "ep2"))
def test_resumes_in_the_same_layout_bit_for_bit_and_in_any_other(
    request: pytest.FixtureRequest, ranks2: RankGroup, tmp_path: Path, layout: str
) -> None:
    options: dict[str, Any] = {"module_options": {"adamw": True}}
    ranks, path = group_of(request, layout), str(tmp_path / "half.ckpt")
    whole = ranks.call(jobs.fit, layout, max_epochs=2, **options)[0]
    ranks.call(jobs.fit, layout, save=path, **options)
    again = ranks.call(jobs.fit, layout, ckpt_path=path, max_epochs=2, **options)[0]
    for name, value in whole["weights"].items():
        assert torch.equal(again["weights"][name], value), name
    expected = reference(jobs.fit, None, max_epochs=2, **options)
    check(whole, expected)
    for other in ("ep2", *WHOLE):
        check(ranks2.call(jobs.fit, other, ckpt_path=path, max_epochs=2, **options)[0], expected)


@pytest.mark.parametrize("first", quick(WHOLE, "pp2"))
def test_checkpoint_of_whole_experts_goes_on_divided(ranks2: RankGroup, tmp_path: Path, first: str) -> None:
    options: dict[str, Any] = {"module_options": {"adamw": True}}
    path = str(tmp_path / "half.ckpt")
    ranks2.call(jobs.fit, first, save=path, **options)
    expected = reference(jobs.fit, None, max_epochs=2, **options)
    check(ranks2.call(jobs.fit, "ep2", ckpt_path=path, max_epochs=2, **options)[0], expected)


@pytest.mark.parametrize(
    "layouts",
    quick(["ep2, dp2", "dp2, ep2", "ep2, tp2", "fsdp2-ep2, ep2-tp2", "ep2-tp2, fsdp4"], "ep2, dp2"),
)
def test_taken_off_again(request: pytest.FixtureRequest, layouts: str) -> None:
    results = group_of(request, layouts).call(jobs.fit, layouts)
    check({**results[0], "metrics": {}}, {**reference(jobs.fit, None, max_epochs=2), "metrics": {}})


@pytest.mark.parametrize(
    ("layout", "kwargs", "message"),
    [
        ("ep3", {}, r"`ep=3`, which must divide the number of experts\. `blocks\.0\.experts` has 4\. Use an `ep` of 2"),
        ("ep2", {"blocks": 0}, r"`ep=2`, but Mixture has no experts that can be divided: .* Use 'dp2'"),
        (
            "ep2",
            {"experts": "Coupled"},
            r"`blocks\.0\.experts` does not return the weighted sum of the outputs of its experts for each",
        ),
    ],
    ids=["not divisible", "no experts", "coupled"],
)
def test_what_can_not_be_divided_is_refused(
    request: pytest.FixtureRequest, layout: str, kwargs: dict[str, Any], message: str
) -> None:
    ranks = RankGroup(3) if layout == "ep3" else request.getfixturevalue("ranks2")
    try:
        with pytest.raises(RankError, match=message):
            ranks.call(jobs.fit, layout, kwargs, timeout_seconds=30.0)
    finally:
        if layout == "ep3":
            ranks.close()
