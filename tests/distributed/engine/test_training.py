"""Training under every layout gives what one process gives: optimizers, accumulation, clipping, logs, data, state."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lightning_hybrid.checkpoint.consolidate import consolidate
from tests.distributed import jobs
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import in_turn, quick, slow

TWO = ["dp2", "fsdp2", "tp2", "pp2"]
FOUR = ["dp2-pp2", "fsdp2-pp2", "tp2-pp2", "fsdp2-tp2", "dp2-fsdp2"]


def assert_same(result: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Weights of rank 0 and metrics."""
    assert list(result["weights"]) == list(expected["weights"])
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=tolerance, atol=1e-6, msg=name)
    for key, value in expected.get("metrics", {}).items():
        assert result["metrics"][key] == pytest.approx(value, rel=tolerance), key


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate and clip": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05},
    "clip by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "adamw with groups and a scheduler": {"module_options": {"optimizer": "adamw"}, "max_epochs": 2},
    "only the head": {"module_options": {"optimizer": "head"}},
    "shuffled": {"shuffle": True, "max_epochs": 2},
    "a smaller last batch": {"samples": 40},
    "built in configure_model": {"module_options": {"lazy": True}},
}


@pytest.fixture(scope="module")
def references() -> dict[str, dict]:
    return {name: reference(jobs.fit, None, **settings) for name, settings in SETTINGS.items()}


@pytest.mark.feature(by="setting", prefix="training: ")
@pytest.mark.parametrize(("layout", "setting"), quick(itertools.product(TWO, SETTINGS), *in_turn(TWO, SETTINGS)))
def test_two_ranks(ranks2: RankGroup, references, layout, setting):
    results = ranks2.call(jobs.fit, layout, **SETTINGS[setting])
    assert_same(results[0], references[setting])
    assert all(r["metrics"] == results[0]["metrics"] for r in results), "every rank has the same metrics"


@pytest.mark.slow
@pytest.mark.feature(by="setting", prefix="training: ")
@pytest.mark.parametrize("setting", ["accumulate and clip", "adamw with groups and a scheduler"])
@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks(ranks4: RankGroup, references, layout, setting):
    results = ranks4.call(jobs.fit, layout, **SETTINGS[setting])
    assert_same(results[0], references[setting])
    assert all(r["metrics"] == results[0]["metrics"] for r in results)


@pytest.mark.feature("predictions, complete and in order")
@pytest.mark.parametrize("layout", TWO)
def test_predictions_are_whole_and_in_order_on_every_rank_of_a_replica(ranks2: RankGroup, layout):
    expected = reference(jobs.predict, None)
    logits = torch.cat([batch["logits"] for batch in expected])
    results = ranks2.call(jobs.predict, layout)
    for predictions in results:
        index = torch.cat([batch["index"] for batch in predictions])
        torch.testing.assert_close(torch.cat([b["logits"] for b in predictions]), logits[index], rtol=1e-5, atol=1e-6)
    seen = {int(i) for predictions in results for batch in predictions for i in batch["index"]}
    assert seen == set(range(24))


@pytest.mark.feature("manual optimization, several optimizers")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2"], "fsdp2"))
def test_manual_optimization_with_two_optimizers(ranks2: RankGroup, layout):
    assert_same(ranks2.call(jobs.fit, layout, "Manual")[0], reference(jobs.fit, None, "Manual"))


@pytest.mark.parametrize(
    ("first", "second"),
    [("pp2", "fsdp2"), ("tp2", "pp2"), slow("fsdp2", "tp2"), slow("tp2", "dp2")],
)
def test_a_module_goes_from_one_trainer_and_layout_to_another(ranks2: RankGroup, first, second):
    assert_same(ranks2.call(jobs.fit_twice, first, second)[0], jobs.fit_twice("one", "one"))


@pytest.mark.parametrize("layout", quick(TWO, "dp2", "tp2"))
def test_fit_validate_fit_with_one_trainer(ranks2: RankGroup, layout):
    expected = reference(jobs.fit_then_test, None)
    for result in ranks2.call(jobs.fit_then_test, layout):
        assert result == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [("fsdp2", "tp2"), slow("pp2", "fsdp2"), slow("tp2", "pp2"), slow(None, "pp2")],
)
def test_a_checkpoint_goes_on_under_another_layout(ranks2: RankGroup, tmp_path, saved, resumed):
    options: dict[str, Any] = {"module_options": {"optimizer": "adamw"}}
    path = str(tmp_path / "one.ckpt")
    expected = reference(jobs.fit, None, max_epochs=2, **options)
    if saved is None:
        jobs.fit(None, save=path, **options)
    else:
        ranks2.call(jobs.fit, saved, save=path, **options)
    result = ranks2.call(jobs.fit, resumed, ckpt_path=path, max_epochs=2, **options)[0]
    assert_same(result, expected)


def test_a_consolidated_checkpoint_is_one_that_lightning_reads(ranks2: RankGroup, tmp_path):
    path = tmp_path / "one.ckpt"
    trained = ranks2.call(jobs.fit, "pp2", save=str(path))[0]
    consolidate(path, tmp_path / "plain.ckpt")
    module = jobs.Classifier.load_from_checkpoint(tmp_path / "plain.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(value, trained["weights"][name])


@pytest.mark.feature("a model built in `configure_model` is never materialized in full on a rank")
@pytest.mark.parametrize("layout", quick(TWO[1:], "pp2"))
def test_a_model_built_in_configure_model_never_exists_whole_on_a_rank(ranks2: RankGroup, layout):
    for peak, size in ranks2.call(jobs.peak_of_build, layout, 1024):
        assert size > 60
        # its half, one weight being divided (two copies of 8 MiB), and what a process group and hooks take
        assert peak < size / 2 + 24, f"{peak:.0f} MiB for a model of {size:.0f} MiB"


@pytest.mark.slow
def test_replicas_need_all_of_it(ranks2: RankGroup):
    for peak, size in ranks2.call(jobs.peak_of_build, "dp2", 1024):
        assert peak > size


@pytest.mark.feature("manual optimization, several optimizers", layout="pp2", refused=True)
def test_manual_optimization_is_refused_under_pp(ranks2: RankGroup):
    with pytest.raises(RankError, match=r"`layout='pp2'` has `pp=2`, but Manual optimizes manually.*such as 'dp2'"):
        ranks2.call(jobs.fit, "pp2", "Manual")


def test_without_a_layout_all_devices_shard(ranks2: RankGroup, references):
    results = ranks2.call(jobs.fit, "none given")
    assert_same(results[0], references["plain"])
