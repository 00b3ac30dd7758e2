"""Decisions about stages: the best balance, right ranks, errors that say what works."""

import itertools

import pytest

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.model import ModelSpec, ParameterSpec
from lightning_hybrid.spec.plan import Plan, call_costs, choose_cuts
from lightning_hybrid.spec.stages import (
    SCHEDULES,
    balance,
    bubble,
    choose_microbatches,
    runnable_schedule,
    stage_ranks,
    stages_per_rank,
)


def worst(costs, cuts):
    bounds = [0, *cuts, len(costs)]
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("costs", [[1, 1, 1, 1], [5, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7], [0, 0, 9, 1, 1, 9, 0]])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_balance_is_optimal(costs, stages):
    allowed = range(1, len(costs))
    best = min(worst(costs, cuts) for cuts in itertools.combinations(allowed, stages - 1))
    chosen = balance(costs, stages, allowed)
    assert chosen is not None
    assert worst(costs, chosen) == best


def test_balance_cuts_only_where_it_may():
    assert balance([1, 1, 1, 1], 2, [3]) == (3,)
    assert balance([1, 1, 1, 1], 3, [3]) is None


def test_stage_ranks():
    assert stage_ranks("1F1B", 3) == (0, 1, 2)
    assert stage_ranks("Interleaved1F1B", 2) == (0, 1, 0, 1)
    assert stage_ranks("DualPipeV", 2) == (0, 1, 1, 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("batch", [1, 3, 8, 15, 16])
def test_microbatches_divide_every_batch(schedule, batch):
    count = choose_microbatches(batch, "auto", 2, schedule)
    assert batch % count == 0
    assert runnable_schedule(schedule, 2, count) in SCHEDULES


def test_too_few_microbatches_run_under_a_schedule_that_can():
    assert runnable_schedule("1F1B", 4, 3) == "GPipe"
    assert runnable_schedule("DualPipeV", 2, 3) == "ZBVZeroBubble"
    assert stages_per_rank("DualPipeV") == stages_per_rank("ZBVZeroBubble")


def test_bubble_formulas():
    assert bubble("1F1B", 4, 12) == pytest.approx(3 / 15)
    assert bubble("Interleaved1F1B", 4, 12) == pytest.approx(1.5 / 13.5)
    assert bubble("ZBVZeroBubble", 4, 8) == pytest.approx(1.5 / 9.5)


def plan(pp, schedule="1F1B", refusals=None, blocks=4):
    names = ["embed", "b0", "b1", "b2", "b3", "head"]
    uses = {"embed.weight": (0, 5), **{f"{n}.weight": (i,) for i, n in enumerate(names) if n.startswith("b")}}
    refusals = {c: None for c in range(1, 6)} | (refusals or {})
    model = ModelSpec(
        units=dict.fromkeys(names, "Linear"),
        blocks=tuple(names[1 : blocks + 1]),
        parameters={n: ParameterSpec(dtype="float32", shape=(2,), calls=uses.get(n, ())) for n in [*uses, "unused"]},
        step="training_step",
        calls=tuple(names),
        costs=call_costs([0, 0, 10, 10, 10, 10, 2]),
        places=tuple(c for c, refusal in refusals.items() if refusal is None),
    )
    layout = Layout(pp=pp)
    cuts = choose_cuts(layout, schedule, model, refusals)
    return Plan(layout=layout, schedule=schedule, microbatches=4, cuts=cuts, model=model)


def test_a_plan_covers_every_module_and_weight_once():
    made = plan(2)
    assert [u for s in made.stages for u in s.units] == ["embed", "b0", "b1", "b2", "b3", "head"]
    assert made.holders["b1.weight"] == (0,)
    assert made.holders["embed.weight"] == (0, 1), "a tied weight is held by both ends"
    assert made.holders["unused"] == (0,)
    assert sum(s.flop_share for s in made.stages) == pytest.approx(1)


def test_a_v_shaped_plan_has_both_ends_on_one_rank():
    assert plan(2, "ZBVZeroBubble").ranks_of("embed.weight") == (0,)


def test_more_stages_than_blocks_is_refused_with_what_works():
    with pytest.raises(PartitionError, match="needs 5 pipeline stages, but the model has only 4 blocks.*at most 4"):
        plan(5)
    with pytest.raises(PartitionError, match="one stage a rank such as '1F1B'"):
        plan(3, "Interleaved1F1B")


def test_a_few_small_blocks_do_not_limit_the_stages():
    """Heads of several tasks are a stack, too, of which a step may call one."""
    model = ModelSpec(
        calls=("first", "second", "third", "heads.0"),
        blocks=("heads.0", "heads.1"),
        units=dict.fromkeys(("first", "second", "third", "heads.0", "heads.1"), "Linear"),
        places=(1, 2, 3),
        costs=(3.0, 3.0, 3.0, 0.5),
        parameters={},
    )
    assert len(choose_cuts(Layout(pp=2), "1F1B", model, {})) == 1
    assert len(choose_cuts(Layout(pp=3), "1F1B", model, {})) == 2


def test_places_that_cannot_be_cut_are_named():
    with pytest.raises(
        PartitionError, match="before `b1`: it reads a value.*does not cut the model, such as 'dp2' or 'fsdp2'"
    ):
        plan(2, refusals={c: "it reads a value" for c in range(1, 6)})
