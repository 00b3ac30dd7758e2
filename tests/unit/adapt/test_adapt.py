"""Decisions about the batch size: pure functions, checked by what must always hold."""

from __future__ import annotations

import math
import random

import pytest
import torch

from lightning_hybrid.adapt.batch_schedule import BatchSizeSchedule
from lightning_hybrid.adapt.batch_size import (
    BatchSizeState,
    DecisionRules,
    StepTimes,
    Votes,
    learning_rate_factor,
    norm_test,
    time_optimal,
    vote,
    wanted,
)
from lightning_hybrid.adapt.division import DivisionLimits, divide
from lightning_hybrid.adapt.gradient_noise import NoiseScale, PartNorms, estimate

# ---- the noise scale


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_estimates_are_unbiased(parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(10, generator=generator, dtype=torch.float64)
    spread = torch.rand(10, generator=generator, dtype=torch.float64) * 3
    batch, trials = 32, 4000
    samples = truth + spread * torch.randn(trials, batch, 10, generator=generator, dtype=torch.float64)
    of_parts = samples.unflatten(1, (parts, -1)).mean(2)
    found = [
        PartNorms(
            parts=parts,
            mean_of_squares=float(g.square().sum(1).mean()),
            square_of_mean=float(g.mean(0).square().sum()),
        ).estimate(batch)
        for g in of_parts
    ]
    noise, signal = torch.tensor(found).mean(0).tolist()
    assert noise == pytest.approx(float(spread.square().sum()), rel=0.05)
    assert signal == pytest.approx(float(truth.square().sum()), rel=0.05)


def test_groups_of_parameters_add_up() -> None:
    whole = PartNorms(parts=4, mean_of_squares=7.0, square_of_mean=3.0)
    halves = [
        PartNorms(parts=4, mean_of_squares=5.0, square_of_mean=1.0),
        PartNorms(parts=4, mean_of_squares=2.0, square_of_mean=2.0),
    ]
    assert estimate(halves, 64) == pytest.approx(whole.estimate(64))
    assert estimate([PartNorms(parts=1, mean_of_squares=5.0, square_of_mean=5.0)], 64) == (0.0, 0.0)


def test_noise_scale_averages_its_parts() -> None:
    scale = NoiseScale(half_life_steps=10)
    assert scale.samples is None
    scale = scale.updated(6.0, 2.0)
    assert scale.samples == pytest.approx(3.0)  # the start at zero is corrected
    for noise in [6.0] * 200 + [0.0] * 10:
        scale = scale.updated(noise, 2.0)
    assert scale.samples == pytest.approx(1.5, rel=1e-3)  # half of it after a half-life
    assert scale.updated(math.nan, 1.0) == scale
    assert NoiseScale().updated(5.0, -1.0).samples == math.inf
    assert NoiseScale().updated(-5.0, 1.0).samples == 0.0


# ---- what is wanted


@pytest.mark.parametrize("tolerance", [0.2, 0.5, 0.8])
def test_norm_test_has_its_fixed_point(tolerance: float) -> None:
    fixed = 100 * (1 / tolerance - 1)
    assert norm_test(int(fixed), 100, tolerance) == pytest.approx(fixed, rel=0.01)
    assert norm_test(32, 1e12, tolerance) == pytest.approx(32 / tolerance)
    assert norm_test(32, 0.0, tolerance) == 0.0


def test_time_optimal_is_the_best_of_all() -> None:
    noise, fixed, each = 900.0, 0.2, 0.001

    def progress(batch: float) -> float:
        return 1 / ((1 + noise / batch) * (fixed + each * batch))

    best = time_optimal(noise, fixed, each)
    assert all(progress(best) >= progress(best * f) for f in (0.5, 0.9, 1.1, 2.0))


def test_step_times_are_fitted() -> None:
    times = StepTimes()
    for _ in range(20):
        times = times.updated(64, 0.3 + 64 * 0.01, 100)
    assert times.fit() is None
    for batch in (128, 64, 256) * 5:
        times = times.updated(batch, 0.3 + batch * 0.01, 100)
    assert times.fit() == pytest.approx((0.3, 0.01))


def test_time_mode_tries_a_larger_batch_where_it_does_no_harm() -> None:
    rules, state = DecisionRules(), BatchSizeState(batch_size=64, first_batch_size=64)
    times = StepTimes().updated(64, 1.0, 100)
    assert wanted("time", state, NoiseScale().updated(500.0, 1.0), times, rules) == 128
    assert wanted("time", state, NoiseScale().updated(5.0, 1.0), times, rules) == 64
    assert wanted("norm", state, NoiseScale(), times, rules) == 64


def test_learning_rate_rules() -> None:
    assert learning_rate_factor("none", 4.0, 1.0, 1.0) == 1.0
    assert learning_rate_factor("sqrt", 4.0, 1.0, 1.0) == 2.0
    assert learning_rate_factor("adascale", 4.0, 1e9, 1.0) == pytest.approx(4.0, rel=1e-6)  # all noise: linear
    assert learning_rate_factor("adascale", 4.0, 0.0, 1.0) == 1.0  # no noise: a larger batch gains nothing
    assert learning_rate_factor("adascale", 4.0, 0.0, 0.0) == 1.0


# ---- votes


def test_votes_must_come_in_a_row() -> None:
    rules, votes = DecisionRules(), Votes()
    size, votes = vote(64, 64 * 1.36, votes, rules)
    assert (size, votes) == (64, Votes(grow=1))
    assert vote(64, 70, votes, rules) == (64, Votes())
    assert vote(64, 64 * 1.6, votes, rules) == (128, Votes())
    votes = Votes(shrink=2)
    assert vote(64, 25, votes, rules) == (32, Votes())
    assert vote(64, 26, votes, rules) == (64, Votes())
    assert vote(63, 1, votes, rules) == (63, Votes(shrink=3))  # no rung of the ladder


def test_noise_around_the_wanted_size_changes_nothing() -> None:
    draws, size, votes = random.Random(0), 256, Votes()
    for _ in range(2000):
        size, votes = vote(size, 256 * math.exp(draws.gauss(0, 0.15)), votes, DecisionRules())
        assert size == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1"),
        ({"factor": 1}, "`factor` must be at least 2"),
        ({"grow_at": 1.0}, "`grow_at` must be above 1"),
        ({"tolerance": 1.0}, "`tolerance` must be between 0 and 1"),
        ({"half_life_steps": 0}, "`half_life_steps` must be above 0"),
    ],
)
def test_bad_rules(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecisionRules(**options)


# ---- division


def test_every_division_makes_the_global_batch() -> None:
    for replicas in (1, 2, 3, 8):
        for micro in (1, 3, 8, 64):
            for most in (1, 4, 16):
                for batch in range(1, 200):
                    limits = DivisionLimits(replicas=replicas, microbatch_size=micro, max_microbatches=most)
                    found = divide(batch, limits)
                    assert (found is None) == bool(batch % replicas)
                    if found is not None:
                        assert replicas * found.per_replica == batch
                        assert found.microbatch_size <= micro
                        assert found.microbatches <= most
                        assert found.batch_size % found.microbatches == 0


def test_division_keeps_to_what_is_fixed() -> None:
    fixed = DivisionLimits(replicas=2, microbatch_size=8, batch_size=8)
    assert str(divide(64, fixed)) == "4 x 8 samples per replica"
    assert divide(24, fixed) is None
    parts = DivisionLimits(replicas=1, microbatch_size=64, min_parts=2)
    assert str(divide(64, parts)) == "2 x 32 samples per replica"
    assert divide(1, parts) is None
    odd = DivisionLimits(replicas=1, microbatch_size=4, max_microbatches=8, runs=lambda n: n != 8)
    assert str(divide(32, odd)) == "2 x 16 samples per replica in 4 microbatches"


# ---- schedules


def test_schedules() -> None:
    deepseek = BatchSizeSchedule(points={0: 3072, 469_000_000_000: 15360}, ramp=True, unit="tokens")
    assert deepseek.batch_size(0) == 3072
    assert deepseek.batch_size(234_500_000_000, multiple_of=256) == 9216
    assert deepseek.batch_size(10**13) == 15360
    sizes = [deepseek.batch_size(t * 10**9, multiple_of=256) for t in range(0, 500, 7)]
    assert sizes == sorted(sizes)
    assert all(s % 256 == 0 for s in sizes)
    steps = BatchSizeSchedule(points={100: 64, 0: 16})
    assert [steps.batch_size(n) for n in (0, 99, 100, 10**6)] == [16, 16, 64, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": {5: 16}}, "`points` must begin at 0"),
        ({"points": {0: 0}}, "batch sizes of at least 1"),
        ({"points": {0: 16}, "unit": "words"}, "`unit` must be 'samples' or 'tokens'"),
    ],
)
def test_bad_schedules(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSizeSchedule(**options)
