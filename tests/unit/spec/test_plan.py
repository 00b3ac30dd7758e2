"""A plan: its words, its text, and what is refused."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_hybrid import HybridStrategy, Layout
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.expert_plan import ExpertPlan
from lightning_hybrid.spec.gradient_sync import GradientSync
from lightning_hybrid.spec.model import ModelSpec, ParameterSpec
from lightning_hybrid.spec.plan import Plan, call_costs
from lightning_hybrid.spec.tensor_plan import ShardedParameter, SlicedArgument, TensorPlan, UnitPlan

UNITS = ("embed", "blocks.0", "blocks.1", "head")
MODEL = ModelSpec(
    units=dict.fromkeys(UNITS, "Block, 2 Linear"),
    blocks=UNITS[1:3],
    parameters={
        f"{unit}.weight": ParameterSpec(dtype="float32", shape=(8, 4), calls=(i,)) for i, unit in enumerate(UNITS)
    }
    | {"scale": ParameterSpec(dtype="bfloat16", shape=(), calls=(0, 3))},
    attributes={"blocks.0": {"heads": 4}},
    step="training_step",
    calls=UNITS,
    costs=call_costs([0.1, 1 / 3, 1e21, 7.5, 2]),
    places=(1, 2, 3),
)
BLOCK = UnitPlan(
    colwise=("up", "gate"),
    rowwise=("down",),
    regions=(("down", "up", "gate"),),
    parameters={"up.weight": ShardedParameter(dim=0, size=16, order=(*range(8, 16), *range(8)))},
    buffers={"mask": ShardedParameter(dim=1, size=4)},
    partial=("norm",),
    shared_outputs={"key": (0, 1, 2)},
    attributes={"": {"heads": 2}},
    selected_outputs={"key": ((0, 1), (2, 3))},
    widths={"rope": 4},
    slices=(SlicedArgument(path=("kwargs", "bias", 0), dim=1, owners=(0, 1)),),
    shared_arguments=(("args", 1),),
)
EVERYTHING = Plan(
    layout=Layout(ep=2, tp=2, pp=2),
    schedule="GPipe",
    microbatches=8,
    gradient_sync=GradientSync(kind="bf16"),
    recompute="selective",
    compile=True,
    cuts=(2,),
    expert_plans={
        f"blocks.{b}.experts": ExpertPlan(
            experts=4,
            tokens=("args", 1),
            index=("args", 0),
            weights=("kwargs", "share"),
            attributes=("n_experts",),
            order=(3, 1, 2, 0),
            hosts=((0, 1, 3), (2, 0)),
        )
        for b in range(2)
    },
    tensor_plan=TensorPlan(
        size=2,
        units={"embed": UnitPlan(), "blocks.0": BLOCK, "blocks.1": BLOCK},
        parameters={"blocks.0.up.weight": BLOCK.parameters["up.weight"]},
        embeddings=("embed",),
        gathered=("head",),
        attention=("attention",),
        used_outside=("scale",),
        written=("scale",),
        reasons={"head": "its 7 outputs are not divisible by 2: `on`"},
        sharded_elements=10,
        total_elements=40,
    ),
    model=MODEL,
)
PIPELINE = Plan(layout=Layout(pp=2), microbatches=4, cuts=(2,), model=MODEL)
WHOLE = Plan(layout=Layout(fsdp=2), recompute="full", model=replace(MODEL, step="", calls=(), costs=(), places=()))


@pytest.mark.parametrize(
    ("old", "new"), [("column", "colwise"), ("row", "rowwise"), ("column_gather", "colwise_gather")]
)
def test_renamed_words_of_tensor_plan_still_work(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"`tensor_plan`: '{old}' is now '{new}'") as found:
        strategy = HybridStrategy(layout="tp2", tensor_plan={"*.a": old, "*.b": "replicate", "*.c": old})
    assert strategy.request.tensor_plan == {"*.a": new, "*.b": "replicate", "*.c": new}
    assert [w.filename for w in found] == [__file__]


def test_present_words_of_tensor_plan_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HybridStrategy(layout="tp2", tensor_plan={"*.a": "colwise", "*.b": "rowwise", "*.c": "colwise_gather"})


# ---- text


@pytest.mark.parametrize("plan", [EVERYTHING, PIPELINE, WHOLE], ids=["everything", "pipeline", "whole"])
def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plan.to_yaml(path)
    assert Plan.from_yaml(path) == plan
    assert Plan.from_yaml(path).to_text() == plan.to_text()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_every_value_is_in_the_text() -> None:
    assert EVERYTHING.tensor_plan is not None
    others = [
        replace(EVERYTHING, microbatches=4),
        replace(EVERYTHING, compile=False),
        replace(EVERYTHING, cuts=(3,)),
        replace(EVERYTHING, tensor_plan=replace(EVERYTHING.tensor_plan, used_outside=())),
        replace(EVERYTHING, model=replace(MODEL, attributes={})),
        replace(EVERYTHING, model=replace(MODEL, costs=(1.0, *MODEL.costs[1:]))),
    ]
    assert len({plan.to_text() for plan in [EVERYTHING, *others]}) == 7
    assert all(Plan.from_text(plan.to_text()) == plan != EVERYTHING for plan in others)


def test_the_text_is_for_people() -> None:
    text = EVERYTHING.to_text()
    assert "stages:\n- [embed, blocks.0]\n- [blocks.1, head]\n" in text
    assert "order: 8-15 0-7" in text
    assert "  blocks.1: *id" in text, "what two blocks have in common is written once"
    assert "    embed.weight: {dtype: float32, shape: [8, 4], calls: [0]}\n" in text


def test_the_table_is_the_text_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert str(PIPELINE).splitlines() == [
        "pp2: 1F1B, 4 microbatches, predicted bubble 20%",
        "┏━━━━━━━┳━━━━━━┳━━━━━━━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━━┓",
        "┃ stage ┃ rank ┃ modules           ┃ blocks ┃ parameters ┃ FLOPs ┃",
        "┡━━━━━━━╇━━━━━━╇━━━━━━━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━━┩",
        "│     0 │    0 │ embed .. blocks.0 │      1 │         65 │  100% │",
        "│     1 │    1 │ blocks.1 .. head  │      1 │         65 │    0% │",
        "└───────┴──────┴───────────────────┴────────┴────────────┴───────┘",
    ]
    assert "all weights, 1 scalars whole" in str(WHOLE)
    table = str(EVERYTHING)
    for cell in ("2 x blocks.*.down", "tp: rowwise", "tp: colwise", "tp: colwise_gather", "ep: 2 of 4 experts"):
        assert cell in table
    record = EVERYTHING.record()
    assert record["stages"][1] == {
        "rank": 1,
        "first_module": "blocks.1",
        "last_module": "head",
        "parameters": 65,
        "flop_share": 0.0005,
    }
    assert "2 x blocks.*.experts: ep: 2 of 4 experts" in record["sharded"]


# ---- files that are no plans


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layout: pp2", "layout: pp2-xx3", "unknown axis 'xx'"),
        ("schedule: 1F1B", "schedule: 2F2B", "`schedule` must be one of GPipe, 1F1B.*Got '2F2B'"),
        ("microbatches: 4", "microbatches: many", "`plan.microbatches` must be int. Got 'many'"),
        ("microbatches: 4", "microbatches: 0", "`microbatches` must be .* at least 1. Got 0"),
        ("compile: false", "compiled: false", "`plan` has no field 'compiled'. Its fields are layout, schedule"),
        ("layout: pp2\n", "", "`plan` lacks `layout`"),
        ("recompute: null", "recompute: most", "`plan.recompute` must be .*Got 'most'"),
        ("kind: exact", "kind: sometimes", "`plan.gradient_sync.kind` must be .*Got 'sometimes'"),
        (
            "- [embed, blocks.0]\n- [blocks.1, head]",
            "- [embed, blocks.0, blocks.1, head]",
            "`cuts` must be 1 ascending",
        ),
        ("places: [1, 2, 3]", "places: [1, 3]", r"`cuts` must be .* \[1, 3\]. Got \(2,\), before blocks.1"),
        (
            "shape: [8, 4]",
            "shape: [8, four]",
            r"`plan.model.parameters.embed.weight.shape\[1\]` must be int. Got 'four'",
        ),
        ("layout: pp2", "layout: [", "It is not YAML"),
        ("layout: pp2", "layout: tp2-pp2", "`tensor_plan` is for tp=1, and `layout='tp2-pp2'` has 2"),
        ("layout: pp2", "layout: ep2-pp2", "`layout='ep2-pp2'` has ep=2, and `expert_plans` has 0 modules"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = PIPELINE.to_text()
    assert old in text
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=f"(?s)plan.yaml` cannot be read as a plan: .*{message}"):
        HybridStrategy(layout=str(path))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.yml` cannot be read as a plan: .*No such file"):
        HybridStrategy(layout=str(tmp_path / "nowhere.yml"))


# ---- arguments beside it


def test_arguments_follow_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    replace(PIPELINE, recompute="full", gradient_sync=GradientSync(kind="bf16")).to_yaml(path)
    request = HybridStrategy(layout=str(path), microbatches=4, recompute="full").request
    assert (str(request.layout), request.schedule, request.microbatches) == ("pp2", "1F1B", 4)
    assert (request.cuts, request.recompute, request.gradient_sync.kind) == ((2,), "full", "bf16")
    assert request.for_another_module() == request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "GPipe"}, "`schedule='GPipe'` contradicts `layout='PATH'`, a plan that has '1F1B'. Leave"),
        ({"microbatches": 2}, "`microbatches=2` contradicts `layout='PATH'`, a plan that has 4. Leave"),
        ({"gradient_sync": "bf16"}, "`gradient_sync=.*kind='bf16'.* contradicts .*kind='exact'"),
        ({"recompute": "full"}, "`recompute='full'` contradicts `layout='PATH'`, a plan that has None"),
        ({"compile": True}, "`compile=True` contradicts `layout='PATH'`, a plan that has False"),
        ({"tensor_plan": {"*": "replicate"}}, "`tensor_plan=.* contradicts .*or give `layout='pp2'` instead"),
    ],
)
def test_arguments_that_contradict_the_plan(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = str(tmp_path / "plan.yaml")
    PIPELINE.to_yaml(path)
    with pytest.raises(ValueError, match=message.replace("PATH", re.escape(path))):
        HybridStrategy(layout=path, **options)


# ---- another model


def _parameters(**changed: Any) -> dict[str, ParameterSpec]:
    return {n: replace(p, **changed) if n == "blocks.0.weight" else p for n, p in MODEL.parameters.items()}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"units": {u: "Other, 2 Linear" if u == "head" else k for u, k in MODEL.units.items()}},
            "unit `head`: Block, 2 Linear in the plan, Other, 2 Linear in the model",
        ),
        (
            {"units": {u: MODEL.units[u] for u in UNITS[:3]}},
            "unit `head`: Block, 2 Linear in the plan, none in the model",
        ),
        (
            {"units": {u: MODEL.units[u] for u in reversed(UNITS)}},
            "the order of units: `embed` in the plan, where the model has `head`",
        ),
        (
            {"parameters": _parameters(shape=(8, 5))},
            "parameter `blocks.0.weight`: float32 [8, 4] in the plan, float32 [8, 5] in the model",
        ),
        (
            {"parameters": _parameters(dtype="float64")},
            "parameter `blocks.0.weight`: float32 [8, 4] in the plan, float64 [8, 4] in the model",
        ),
        (
            {"parameters": _parameters() | {"more": ParameterSpec(dtype="int8", shape=(1,))}},
            "parameter `more`: none in the plan, int8 [1] in the model",
        ),
        ({"attributes": {"blocks.0": {"heads": 8}}}, "attribute of `blocks.0`, `heads`: 4 in the plan, 8 in the model"),
        ({"calls": UNITS[:3]}, "call 3 of `training_step`: `head` in the plan, none in the model"),
        (
            {"parameters": _parameters(calls=(1, 2))},
            "calls of `training_step` that use parameter `blocks.0.weight`: [1] in the plan, [1, 2] in the model",
        ),
        (
            {"places": (1, 3)},
            "calls of `training_step` before which the model may be cut: [1, 2, 3] in the plan, [1, 3] in the model",
        ),
    ],
)
def test_the_first_difference_is_named(changes: dict[str, Any], difference: str) -> None:
    assert MODEL.difference(replace(MODEL, **changes)) == difference


def test_what_depends_on_the_batch_or_the_step_is_no_difference() -> None:
    assert MODEL.difference(replace(MODEL, costs=(1.0,) * 4)) is None
    assert MODEL.difference(replace(MODEL, step="validation_step", calls=UNITS[:2], places=())) is None


def test_plans_of_nothing_that_fits_are_refused() -> None:
    with pytest.raises(PartitionError, match="`cuts` must be 3 ascending numbers"):
        replace(PIPELINE, schedule="ZBVZeroBubble")
    name, plan = next(iter(EVERYTHING.expert_plans.items()))
    with pytest.raises(PartitionError, match="`expert_orders` must have each of the 4 experts"):
        replace(EVERYTHING, expert_plans={name: replace(plan, order=(0, 0, 1, 2))})
