"""Decisions about the balance of load: cuts, experts, shares, packing, and when a move pays."""

from __future__ import annotations

import itertools
import random
import statistics
import time

import pytest

from lightning_hybrid.adapt.expert_placement import (
    imbalance,
    kept_in_place,
    least_imbalance,
    owners,
    place_experts,
    replica_counts,
)
from lightning_hybrid.adapt.rebalance import RebalancingRules, Watch, judge, look
from lightning_hybrid.adapt.shares import pack, sequence_cost, share_by_speed
from lightning_hybrid.adapt.stage_cuts import StageTime, best_cuts, fit_costs, step_seconds


def stages_of(costs: list[float], cuts: tuple[int, ...], speeds: list[float]) -> list[float]:
    bounds = [0, *cuts, len(costs)]
    return [sum(costs[a:b]) * s for a, b, s in zip(bounds, bounds[1:], speeds, strict=False)]


@pytest.mark.parametrize("seed", range(40))
def test_cuts_are_those_of_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    count, stages, microbatches = rng.randint(4, 11), rng.randint(2, 4), rng.choice([1, 2, 4, 16])
    costs = [rng.uniform(0.2, 3) for _ in range(count)]
    speeds = [rng.choice([1.0, 1.0, 2.0, rng.uniform(0.5, 3)]) for _ in range(stages)]
    places = sorted(rng.sample(range(1, count), rng.randint(stages - 1, count - 1)))
    cuts = best_cuts(costs, speeds, microbatches, places)
    assert cuts is not None
    assert set(cuts) <= set(places)
    best = min(
        step_seconds(stages_of(costs, c, speeds), microbatches) for c in itertools.combinations(places, stages - 1)
    )
    assert step_seconds(stages_of(costs, cuts, speeds), microbatches) == pytest.approx(best)


def test_a_stage_of_half_the_speed() -> None:
    """16 blocks on 4 ranks, the third one slow: as the formula says, 1.5 times as fast as the equal cut."""
    costs, speeds = [1.0] * 16, [1.0, 1.0, 2.0, 1.0]
    cuts = best_cuts(costs, speeds, 16, range(1, 16))
    assert cuts is not None
    equal = step_seconds(stages_of(costs, (4, 8, 12), speeds), 16)
    assert equal / step_seconds(stages_of(costs, cuts, speeds), 16) > 1.5


def test_too_few_places() -> None:
    assert best_cuts([1.0] * 8, [1.0] * 4, 4, [2, 4]) is None


def test_cuts_of_a_deep_model_are_found_at_once() -> None:
    rng = random.Random(1)
    costs = [rng.uniform(0.5, 2) for _ in range(128)]
    began = time.process_time()
    best_cuts(costs, [rng.uniform(0.8, 2) for _ in range(16)], 32, range(1, 128))
    assert time.process_time() - began < 10


def test_a_slow_stage_is_a_slow_rank_until_times_contradict() -> None:
    prior = [1.0] * 8
    times = [StageTime(rank=0, first=0, stop=4, seconds=4.0), StageTime(rank=1, first=4, stop=8, seconds=8.0)]
    costs, speeds = fit_costs(prior, times, 2)
    assert costs == pytest.approx(prior)
    assert speeds == pytest.approx([1.0, 2.0])
    # the cut moves to 5; it was the blocks 4 to 7 that are heavy: rank 0 takes 6 seconds for five, rank 1 6 for three
    times += [StageTime(rank=0, first=0, stop=5, seconds=6.0), StageTime(rank=1, first=5, stop=8, seconds=6.0)]
    costs, speeds = fit_costs(prior, times, 2)
    for t in times:
        assert speeds[t.rank] * sum(costs[t.first : t.stop]) == pytest.approx(t.seconds, rel=0.02)
    assert costs[4] > 1.5 * costs[0], "it has been seen to be heavy on both"


@pytest.mark.parametrize("spare", [0, 32])
@pytest.mark.parametrize("seed", range(3))
def test_hot_experts(seed: int, spare: int) -> None:
    """Zipf's law over 256 experts on 32 ranks."""
    rng = random.Random(seed)
    loads = [1 / (i + 1) for i in range(256)]
    rng.shuffle(loads)
    placement = place_experts(loads, 32, spare)
    assert {len(experts) for experts in placement} == {(256 + spare) // 32}
    assert all(len(set(experts)) == len(experts) for experts in placement)
    assert {e for experts in placement for e in experts} == set(range(256))
    found, bound = imbalance(loads, placement), least_imbalance(loads, 32, spare)
    assert found <= 1.05 * bound
    assert found < (1.06 if spare else 6)
    assert placement == place_experts(loads, 32, spare), "the same on all ranks"


def test_experts_of_58_layers_are_placed_at_once() -> None:
    rng = random.Random(0)
    layers = []
    for _ in range(58):
        loads = [1 / (i + 1) for i in range(256)]
        rng.shuffle(loads)
        layers.append(loads)
    began = time.process_time()
    for loads in layers:
        place_experts(loads, 32, 32)
    assert time.process_time() - began < 0.5, "0.05 s on a machine that does nothing else"


@pytest.mark.parametrize("seed", range(30))
def test_no_rank_has_an_expert_twice(seed: int) -> None:
    rng = random.Random(seed)
    ranks = rng.choice([2, 3, 4])
    experts = ranks * rng.randint(1, 4)
    spare = ranks * rng.randint(0, experts * (ranks - 1) // ranks)
    loads = [rng.choice([0.0, 1.0, rng.expovariate(0.3)]) for _ in range(experts)]
    placement = place_experts(loads, ranks, spare)
    assert {len(found) for found in placement} == {(experts + spare) // ranks}
    assert all(len(set(found)) == len(found) for found in placement)
    counts = [sum(e in found for found in placement) for e in range(experts)]
    assert counts == replica_counts(loads, experts + spare, ranks)


def test_places_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="8 experts and 1 spare places cannot be divided equally by 4 ranks"):
        place_experts([1.0] * 8, 4, 1)
    with pytest.raises(ValueError, match="`places` must be between the number of experts, 2, and 2 times it"):
        replica_counts([1.0, 1.0], 5, 2)


@pytest.mark.parametrize(("experts", "ranks", "spare"), [(256, 32, 32), (64, 8, 16), (16, 4, 4), (8, 4, 0)])
def test_owners_compute_what_they_have(experts: int, ranks: int, spare: int) -> None:
    rng = random.Random(experts)
    loads = [1000.0 / (1 + i) for i in range(experts)]
    rng.shuffle(loads)
    each = experts // ranks
    present = [list(range(r * each, (r + 1) * each)) for r in range(ranks)]
    placement = place_experts(loads, ranks, spare)
    hosts = kept_in_place(placement, present)
    assert sorted(hosts) == sorted(placement)
    found = owners(hosts, present)
    assert sorted(e for own in found for e in own) == list(range(experts))
    assert {len(own) for own in found} == {each}
    elsewhere = sum(len(set(own) - set(hosted)) for own, hosted in zip(found, hosts, strict=True))
    assert elsewhere <= max(1, 0.03 * experts)
    if not spare:
        assert found == [sorted(hosted) for hosted in hosts]
    assert owners([[*own, (own[-1] + 1) % experts] for own in present], present) == present, "nothing has to move"


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_those_of_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    seconds = [rng.uniform(0.5, 2) for _ in range(3)]
    parts = rng.randint(3, 12)
    counts = share_by_speed(seconds, parts)
    assert sum(counts) == parts
    assert min(counts) >= 1
    choices = [c for c in itertools.product(range(1, parts + 1), repeat=3) if sum(c) == parts]
    best = min(max(n * t for n, t in zip(c, seconds, strict=True)) for c in choices)
    assert max(n * t for n, t in zip(counts, seconds, strict=True)) == pytest.approx(best)


def test_one_of_four_ranks_is_half_as_fast() -> None:
    counts = share_by_speed([1, 1, 2, 1], 32)
    assert max(n * t for n, t in zip(counts, [1, 1, 2, 1], strict=True)) == 10
    assert share_by_speed([1, 1, 9, 1], 32, most=10) == [10, 10, 2, 10]
    with pytest.raises(ValueError, match="`parts` must be at least the 3 ranks"):
        share_by_speed([1, 1, 1], 2)


def test_sequences_are_packed_close_to_the_bound() -> None:
    rng = random.Random(2)
    costs = [sequence_cost(int(min(8192, 64 * rng.paretovariate(1.2))), 1024) for _ in range(1024)]
    began = time.process_time()
    found = pack(costs, 64)
    assert time.process_time() - began < 0.05
    assert sorted(i for b in found for i in b) == list(range(1024))
    totals = [sum(costs[i] for i in b) for b in found]
    assert max(totals) <= 1.01 * max(sum(costs) / 64, max(costs))
    limited = pack(costs, 64, capacity=16)
    assert {len(b) for b in limited} == {16}
    with pytest.raises(ValueError, match="4 bins of 2 items have no room for 9"):
        pack([1.0] * 9, 4, 2)


@pytest.mark.parametrize("seed", range(10))
def test_noise_moves_nothing(seed: int) -> None:
    """500 steps of 4 equal ranks with 16 blocks, whose times are noisy by a fifth."""
    rng, rules, watch = random.Random(seed), RebalancingRules(), Watch()
    costs, cuts, times, moved = [1.0] * 16, (4, 8, 12), [], 0
    for step in range(1, 501):
        times.append([t * rng.lognormvariate(0, 0.2) for t in stages_of(costs, cuts, [1.0] * 4)])
        if step % rules.every_n_steps:
            continue
        usual = [statistics.median(column) for column in zip(*times, strict=True)]
        bounds = [0, *cuts, 16]
        seen = [StageTime(rank=r, first=bounds[r], stop=bounds[r + 1], seconds=t) for r, t in enumerate(usual)]
        fitted, speeds = fit_costs(costs, seen, 4)
        better = best_cuts(fitted, speeds, 8, range(1, 16))
        assert better is not None
        present = step_seconds(usual, 8)
        gain = 1 - step_seconds(stages_of(fitted, better, speeds), 8) / present
        moves, watch = look(watch, gain, present, 500 - step, 0.5, rules)
        cuts, moved, times = better if moves else cuts, moved + moves, []
    assert moved == 0


def test_a_move_that_pays_is_made_and_kept() -> None:
    rules = RebalancingRules()
    moves, watch = look(Watch(), 0.3, 1.0, 100, 2.0, rules)
    assert not moves
    moves, watch = look(watch, 0.3, 1.0, 99, 2.0, rules)
    assert moves
    assert (watch.rest, watch.gain) == (2, 0.3)
    assert judge(watch, 0.9, rules) == (False, Watch(rest=1, before_seconds=1.0, gain=0.3))
    back, watch = judge(judge(watch, 0.7, rules)[1], 0.72, rules)
    assert not back
    assert watch.failed == 0


def test_a_move_that_brings_nothing_is_taken_back() -> None:
    rules = RebalancingRules()
    watch = Watch(rest=1, before_seconds=1.0, gain=0.2)
    back, watch = judge(watch, 0.99, rules)
    assert back
    assert watch.failed == 1
    assert not look(Watch(votes=1, failed=1), 0.08, 1.0, 1000, 0.1, rules)[0], "more must be promised now"
    assert look(Watch(votes=1, failed=1), 0.12, 1.0, 1000, 0.1, rules)[0]


def test_a_move_at_the_end_does_not_pay() -> None:
    assert not look(Watch(votes=5), 0.3, 1.0, 3, 2.0, RebalancingRules())[0]


@pytest.mark.parametrize(
    ("name", "value"), [("every_n_steps", 0), ("votes", 0), ("min_gain", 0.0), ("kept_share", 1.0)]
)
def test_rules_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        RebalancingRules(**{name: value})  # pyright: ignore[reportArgumentType] -- that is the point
