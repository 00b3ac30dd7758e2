"""`AdaptiveBatchSize` under layouts: the statistics, every switch, and a resumed run, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from tests.distributed.callbacks import adaptive_jobs as jobs
from tests.harness import RankError, RankGroup
from tests.pairwise import quick, slow

FEATURE = "`AdaptiveBatchSize`"


def group_of(request: pytest.FixtureRequest, layout: str) -> RankGroup:
    return request.getfixturevalue("ranks4" if "-" in layout else "ranks2")


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("layout", "replicas", "schedule", "microbatches"),
    [
        ("dp2", 2, "1F1B", 1),
        ("fsdp2", 2, "1F1B", 1),
        ("tp2", 1, "1F1B", 1),
        ("pp2", 1, "1F1B", 4),
        slow("pp2", 1, "GPipe", 4),
        slow("pp2", 1, "Interleaved1F1B", 4),
        ("pp2", 1, "ZBVZeroBubble", 4),
        slow("pp2", 1, "DualPipeV", 4),
        slow("fsdp2-pp2", 2, "1F1B", 2),
        slow("dp2-tp2", 2, "1F1B", 1),
        slow("tp2-pp2", 1, "1F1B", 4),
    ],
)
def test_noise_equals_that_of_single_parts(
    request: pytest.FixtureRequest, layout: str, replicas: int, schedule: str, microbatches: int
) -> None:
    options: dict[str, Any] = {"strategy_options": {"schedule": schedule, "microbatches": microbatches}}
    results = group_of(request, layout).call(jobs.noise, layout, **options)
    expected = jobs.noise_of_parts(replicas, microbatches)
    for result in results:
        assert result["parts"] == [[2 * replicas * microbatches]] * 3
        torch.testing.assert_close(torch.tensor(result["found"]), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(("layout", "replicas", "group"), [("ep2", 2, 2), slow("fsdp2-ep2", 4, 2)])
def test_noise_with_divided_experts(request: pytest.FixtureRequest, layout: str, replicas: int, group: int) -> None:
    results = group_of(request, layout).call(jobs.noise, layout, "Mixture")
    expected = jobs.noise_of_parts(replicas, 1, "Mixture", group=group)
    assert results[0]["parts"] == [[2 * replicas, 2 * replicas // group]] * 3
    for result in results:
        torch.testing.assert_close(torch.tensor(result["found"]), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("layout", "replicas", "microbatches"), [("dp2", 2, 1), slow("pp2", 1, 4)])
def test_noise_is_not_that_of_the_scaled_loss(ranks2: RankGroup, layout: str, replicas: int, microbatches: int) -> None:
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    results = ranks2.call(jobs.noise, layout, plugins=[half], strategy_options={"microbatches": microbatches})
    expected = jobs.noise_of_parts(replicas, microbatches)
    for result in results:
        torch.testing.assert_close(torch.tensor(result["found"]), torch.tensor(expected), rtol=0.02, atol=0)


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "fsdp2"))
def test_weights_that_are_unfrozen_are_measured(ranks2: RankGroup, layout: str) -> None:
    first, second = ranks2.call(jobs.measured_weights, layout)[0]
    assert second == first + 4


def check_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["gradients"]) == len(expected["gradients"])
    for step, (own, one) in enumerate(zip(found["gradients"], expected["gradients"], strict=True)):
        for name, norm in one.items():
            assert float(own[name]) == pytest.approx(float(norm), rel=1e-5), (step, name)
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("layout", "batch", "microbatches"),
    [
        slow("dp2", 2, 1),
        slow("pp2", 4, 2),
        slow("fsdp2", 2, 1),
        slow("fsdp2-pp2", 2, 2),
    ],
)
def test_every_change_of_accumulation(
    request: pytest.FixtureRequest, layout: str, batch: int, microbatches: int
) -> None:
    walk = jobs.every_transition(8)
    divisions = [(batch, batches, microbatches) for batches in walk]
    results = group_of(request, layout).call(jobs.planned, layout, divisions, 4 * sum(walk))
    check_steps(results[0], jobs.of_one_process([4 * batches for batches in walk], 4 * sum(walk)))


@pytest.mark.parametrize("workers", [0, slow(2), -2], ids=["no workers", "workers", "workers that persist"])
@pytest.mark.parametrize("layout", ["dp2", slow("fsdp2")])
def test_loader_of_other_batches(ranks2: RankGroup, layout: str, workers: int) -> None:
    divisions = [(2, 1, 1), (4, 2, 1), (1, 3, 1), (8, 1, 1), (2, 2, 1), (6, 1, 1)]
    steps = [2 * batch * batches for batch, batches, _ in divisions]
    samples = sum(steps) + 5
    loader_options: dict[str, Any] = {}
    if workers:
        loader_options = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": workers < 0}
    results = ranks2.call(jobs.planned, layout, divisions, samples, loader_options=loader_options)
    check_steps(results[0], jobs.of_one_process(steps, samples))


@pytest.mark.parametrize(
    "schedule",
    [
        "1F1B",
        *(slow(s) for s in ("GPipe", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")),
    ],
)
def test_pipeline_of_other_microbatches(ranks2: RankGroup, schedule: str) -> None:
    divisions = [(4, 1, 2), (8, 1, 4), (4, 3, 1), (8, 2, 2), (16, 1, 8), (2, 1, 1)]
    steps = [batch * batches for batch, batches, _ in divisions]
    options: dict[str, Any] = {"strategy_options": {"schedule": schedule, "microbatches": 2}}
    results = ranks2.call(jobs.planned, "pp2", divisions, sum(steps) + 1, **options)
    check_steps(results[0], jobs.of_one_process(steps, sum(steps) + 1))


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize("layout", ["dp2", *map(slow, ("fsdp2", "tp2", "pp2", "fsdp2-pp2"))])
def test_run_is_that_of_a_plain_loop(request: pytest.FixtureRequest, layout: str) -> None:
    found = group_of(request, layout).call(jobs.adapt, layout, samples=3200, timeout_seconds=150)
    assert len(found[0]["events"]) >= 2
    for result in found[1:]:
        assert result["events"] == found[0]["events"]
    expected = jobs.replayed(found[0]["events"], 3200)
    assert found[0]["rates"] == pytest.approx(expected["rates"], rel=1e-6)
    for name, value in found[0]["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
    check_logs(found[0]["logged"], found[0]["steps"][-1][0])


def check_logs(logged: dict[str, float], last_batch: int) -> None:
    """Decisions and noise are logged."""
    assert logged["global_batch_size"] == last_batch > 16
    assert logged["learning_rate_factor"] == pytest.approx((last_batch / 16) ** 0.5)
    assert logged["gradient_noise_scale"] > 0


@pytest.mark.parametrize(
    ("layouts", "options"),
    [
        slow({20: "tp2-pp2"}, {}),
        slow({10: "tp2-pp2", 40: "fsdp4", 60: "dp2-pp2"}, {}),
        pytest.param(
            {10: "pp4", 20: "dp2-fsdp2"},
            {"optimizer": "sgd", "options": {"learning_rate": "adascale"}},
            marks=pytest.mark.slow,
        ),
        slow({20: "dp2-fsdp2"}, {"options": {"max_microbatch_size": 2}}),
    ],
    ids=["once", "adam", "adascale", "small microbatches"],
)
def test_run_in_several_layouts_is_that_of_a_plain_loop(
    ranks4: RankGroup, layouts: dict[int, str], options: dict[str, Any]
) -> None:
    samples = 4800 if 60 in layouts else 2400
    found = ranks4.call(jobs.adapt, "dp4", layouts=layouts, samples=samples, **options)[0]
    growth = [e["step"] for e in found["events"]]
    assert growth[0] < min(layouts) < growth[-1], "batches grow before and after"
    if "optimizer" not in options:
        expected = jobs.replayed(found["events"], samples)
        assert found["rates"] == pytest.approx(expected["rates"], rel=1e-6)
        for name, value in found["weights"].items():
            torch.testing.assert_close(value, expected["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
    if "max_microbatch_size" in options.get("options", {}):
        assert found["division"][0] == 2


@pytest.mark.parametrize(
    ("options", "relayout_options", "message"),
    [
        slow({"options": {"memory": 2**30}}, {}, "`memory` of `AdaptiveBatchSize` has measured what fits under 'dp2'"),
        ({}, {"gradient_sync": "diloco"}, "`statistics` compares the gradients of replicas with their mean"),
    ],
    ids=["memory", "diloco"],
)
def test_layouts_that_it_refuses(
    ranks2: RankGroup, options: dict[str, Any], relayout_options: dict[str, Any], message: str
) -> None:
    to = "dp2" if relayout_options else "pp2"
    with pytest.raises(RankError, match=message):
        ranks2.call(jobs.adapt, "dp2", layouts={3: to}, relayout_options=relayout_options, samples=640, **options)


@pytest.mark.slow
def test_layouts_with_equal_parts_decide_alike(ranks2: RankGroup) -> None:
    options = {"accumulate_grad_batches": 2, "batch": 8, "samples": 3200}
    events = [ranks2.call(jobs.adapt, layout, **options)[0]["events"] for layout in ("dp2", "fsdp2")]
    assert events[0]
    assert events[0] == events[1]


@pytest.mark.slow
def test_loaders_that_are_made_anew_every_epoch(ranks2: RankGroup) -> None:
    # with memory for them, larger batches are larger batches of the loader
    options: dict[str, Any] = {"samples": 800, "max_epochs": 3, "options": {"memory": 2**30}}
    kept = ranks2.call(jobs.adapt, "dp2", **options)[0]
    found = ranks2.call(jobs.adapt, "dp2", reload_dataloaders_every_n_epochs=1, **options)[0]
    assert found["events"] == kept["events"]
    assert len({e["samples"] // 800 for e in kept["events"]}) >= 2  # in two epochs
    assert found["division"][0] > 8
    assert found["steps"] == kept["steps"]
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, kept["weights"][name], rtol=0, atol=0, msg=name)


def check_resumed(found: dict[str, Any], whole: dict[str, Any], step: int) -> None:
    assert [e["to"] for e in found["events"]] == [e["to"] for e in whole["events"]]
    assert [e["samples"] for e in found["events"]] == [e["samples"] for e in whole["events"]]
    assert found["rates"] == pytest.approx(whole["rates"][step:], rel=1e-6)
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, whole["weights"][name], rtol=0, atol=0, msg=name)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    "layout",
    ["dp2", slow("pp2"), slow("fsdp2")],
)
def test_resumed_run_decides_as_the_whole(ranks2: RankGroup, layout: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 1200, "shuffle": True, "max_epochs": 2}
    whole = ranks2.call(jobs.adapt, layout, **options)[0]
    changes = [e["step"] for e in whole["events"]]
    assert len(changes) >= 2
    epoch_end = next(i for i in range(len(whole["steps"])) if i and whole["epochs"][i] == 1)
    places = (changes[0], changes[0] + 1, changes[1] - 1, changes[1], epoch_end)
    for step in (epoch_end,) if layout == "dp2" else places:
        path = str(tmp_path / f"{step}.ckpt")
        ranks2.call(jobs.adapt, layout, save=path, save_at=step, **options)
        found = ranks2.call(jobs.adapt, layout, ckpt_path=path, **options)[0]
        check_resumed(found, whole, step)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("dp2", "tp2"), ("pp2", "dp2"), ("dp2", "fsdp2")])
def test_resumed_in_another_layout_keeps_the_batch(ranks2: RankGroup, before: str, after: str, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.ckpt")
    options: dict[str, Any] = {"samples": 2400, "shuffle": True}
    whole = ranks2.call(jobs.adapt, before, **options)[0]
    step = whole["events"][-1]["step"] + 1
    ranks2.call(jobs.adapt, before, save=path, save_at=step, **options)
    fixed = {"rules": {"every_n_steps": 10**9}}
    found = ranks2.call(jobs.adapt, after, ckpt_path=path, **fixed, **options)[0]
    size = whole["steps"][step - 1][0]
    assert size > 16
    assert {s for s, _ in found["steps"]} == {size}
    assert found["samples"] == 2400


def test_batches_by_a_schedule(ranks2: RankGroup) -> None:
    schedule = {"points": {0: 16, 640: 64}, "ramp": True}
    found = ranks2.call(jobs.scheduled, "dp2", schedule, samples=1600)[0]
    sizes = [e["to"] for e in found["events"]]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 64
    assert all(s % 16 == 0 for s in sizes)
    expected = jobs.replayed(found["events"], 1600)
    assert found["rates"] == pytest.approx(expected["rates"], rel=1e-6)
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("unit", [slow("samples"), "tokens"])
def test_training_stops_at_a_budget(ranks2: RankGroup, unit: str) -> None:
    # a sample of the regression has eight numbers
    budget = {"samples": {"max_samples": 1000}, "tokens": {"max_tokens": 8000}}[unit]
    found = ranks2.call(jobs.adapt, "dp2", samples=3200, options=budget)[0]
    last = found["steps"][-1][0]
    assert 1000 <= found["samples"] < 1000 + last


def test_sgd_takes_the_gain_of_adascale(ranks2: RankGroup) -> None:
    found = ranks2.call(jobs.adapt, "dp2", samples=3200, optimizer="sgd", options={"learning_rate": "auto"})[0]
    growth = found["steps"][-1][0] / 16
    assert growth > 2
    factor = found["rates"][-1] / found["steps"][-2][1]
    assert 1.0 < factor <= growth
    assert factor != pytest.approx(growth**0.5, rel=1e-3)


@pytest.mark.parametrize("how", ["stream", slow("sized")])
def test_loader_that_cannot_be_read_differently_is_accumulated(ranks2: RankGroup, how: str) -> None:
    options: dict[str, Any] = {"limit_train_batches": 200} if how == "sized" else {"stream": True}
    found = ranks2.call(jobs.adapt, "dp2", samples=3200, **options)[0]
    assert len(found["events"]) >= 2
    assert found["division"] == (8, found["steps"][-1][0] // 16, 1)


def test_one_part_cannot_tell_the_noise(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="of at least two parts, whose gradients `statistics` compares"):
        ranks2.call(jobs.adapt, "tp2", stream=True, samples=320)


def test_two_masters_of_accumulation(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="both change `accumulate_grad_batches`"):
        ranks2.call(jobs.adapt, "dp2", scheduler=True, samples=320)


def test_batch_that_replicas_cannot_share(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="A global batch of 15 samples must be made of equal batches of 2 replicas"):
        ranks2.call(jobs.scheduled, "dp2", {"points": {0: 15}}, samples=320)


@pytest.mark.feature("`AdaptiveBatchSize(memory=...)`")
@pytest.mark.parametrize("layout", [*map(slow, ("dp2", "fsdp2", "tp2")), "pp2"])
def test_microbatch_that_fits_on_all_ranks(ranks2: RankGroup, layout: str) -> None:
    options: dict[str, Any] = {"options": {"memory": "device"}, "fits": {0: 300, 1: 37}}
    found = ranks2.call(jobs.adapt, layout, samples=1600, batch=64, **options)
    for result in found:
        assert result["microbatch_size"] == 32  # the sizes that divide a batch are powers of two
        size, _, microbatches = result["division"]
        assert size // microbatches <= 32
    expected = jobs.replayed(found[0]["events"], 1600, first=64)
    for name, value in found[0]["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_batch_larger_than_the_loaders_fits(ranks2: RankGroup) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 8, "rules": {"every_n_steps": 10**9}}
    found = ranks2.call(jobs.adapt, "dp2", samples=1600, batch=16, options={"memory": 2**30}, **options)[0]
    assert found["division"] == (64, 1, 1)
    expected = jobs.replayed([], 1600, first=128)
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("steps", "batch"), [((3, 4), 16), slow((3, 5, 7), 32)])
def test_memory_that_is_short_twice_halves_the_microbatch(
    ranks2: RankGroup, steps: tuple[int, ...], batch: int
) -> None:
    options: dict[str, Any] = {"rules": {"every_n_steps": 10**9}, "short_of_memory_at": steps}
    found = ranks2.call(jobs.adapt, "dp2", samples=1600, batch=64, options={"memory": 2**30}, **options)
    for result in found:
        assert result["division"][0] == batch
        assert result["events"] == []
    expected = jobs.replayed([], 1600, first=64)
    for name, value in found[0]["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-4, atol=1e-5, msg=name)


def test_share_of_memory_is_for_accelerators(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="`memory=0.5` is a share of an accelerator's memory"):
        ranks2.call(jobs.adapt, "dp2", samples=320, options={"memory": 0.5})


def test_run_without_memory_says_how_it_goes_on(ranks2: RankGroup) -> None:
    """As it says, with half of the microbatch: the same global batch, trained to the same weights."""
    options: dict[str, Any] = {"rules": {"every_n_steps": 10**9}, "fits": {0: 16, 1: 16}, "batch": 64}
    advice = "".join(ranks2.call(jobs.advice, "dp2", samples=320, **options))
    assert "ran out of memory with microbatches of 32 samples" in advice
    assert "`max_microbatch_size=16`" in advice
    found = ranks2.call(jobs.adapt, "dp2", samples=320, options={"max_microbatch_size": 16}, **options)[0]
    assert found["division"] == (16, 2, 1)
    expected = jobs.replayed([], 320, first=64)
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
