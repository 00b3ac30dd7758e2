"""A run from a written plan is the run that has written it, and a change in the file is a change of the run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lightning_hybrid import HybridStrategy
from lightning_hybrid.collectives import to_local
from lightning_hybrid.ghosts.ghost import Ghost
from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import Classifier, Numbers, quiet
from tests.harness import RankError, RankGroup


class CountForwards(L.Callback):
    """Calls of the first block in training, on tensors with values."""

    forwards = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.blocks[0].register_forward_pre_hook(lambda _, args: self._count(args[0]))

    def _count(self, x: torch.Tensor) -> None:
        self.forwards += not isinstance(x, Ghost)


def run(layout: str, write: str | None = None, kind: str = "Classifier", **options: Any) -> dict[str, Any]:
    """Two epochs with a smaller last batch."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = {"Classifier": Classifier, "Mixture": Mixture}[kind](**options.pop("module_options", {}))
    strategy = HybridStrategy(layout=layout, **{"verify": "off", **options})  # whose calls of blocks would count
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[count := CountForwards()],
    )
    trainer.fit(module, DataLoader(Numbers(40), batch_size=16 // strategy.layout.replicas))
    if write is not None:
        strategy.plan.to_yaml(write)
    with strategy.engine.divided():
        parts = {n: tuple(to_local(p).shape) for n, p in strategy.engine.partition.parameters.local().items()}
    return {
        "plan": pickle.dumps(strategy.plan),
        "weights": strategy.full_state_dict(),
        "forwards": count.forwards,
        "parts": parts,
        "loss": float(trainer.callback_metrics["loss_epoch"]),
    }


FIRST = [
    pytest.param("pp2", {"schedule": "GPipe", "microbatches": 2}, id="pp2"),
    pytest.param(
        "tp2", {"tensor_plan": {"blocks.0": "replicate", "head": "colwise_gather"}}, id="tp2", marks=pytest.mark.slow
    ),
    pytest.param("ep2", {"kind": "Mixture"}, id="ep2", marks=pytest.mark.slow),
    pytest.param("fsdp2", {"recompute": "full", "gradient_sync": "bf16"}, id="fsdp2"),
]


@pytest.mark.parametrize(("layout", "options"), FIRST)
def test_run_from_its_own_plan(ranks2: RankGroup, tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    path = str(tmp_path / "plan.yaml")
    first = ranks2.call(run, layout, path, **options)
    again = ranks2.call(run, path, kind=options.get("kind", "Classifier"))
    for before, after in zip(first, again, strict=True):
        assert pickle.loads(after["plan"]) == pickle.loads(before["plan"])
        assert {k: after[k] for k in ("parts", "forwards", "loss")} == {
            k: before[k] for k in ("parts", "forwards", "loss")
        }
    for name, value in first[0]["weights"].items():
        assert torch.equal(again[0]["weights"][name], value), name


def _edited(path: str, edit: Any) -> None:
    data = yaml.safe_load(Path(path).read_text())
    edit(data)
    Path(path).write_text(yaml.safe_dump(data, sort_keys=False))


def test_a_changed_cut_changes_the_stages(ranks2: RankGroup, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.yaml")
    first = ranks2.call(run, "pp2", path)

    def move(data: Any) -> None:
        data["stages"][1].insert(0, data["stages"][0].pop())
        data["recompute"] = "full"

    _edited(path, move)
    again = ranks2.call(run, path)
    (before, after) = (pickle.loads(results[0]["plan"]).stages for results in (first, again))
    assert [len(s.units) for s in after] == [len(before[0].units) - 1, len(before[1].units) + 1]
    moved = before[0].units[-1]
    assert [any(n.startswith(f"{moved}.") for n in r["parts"]) for r in first] == [True, False]
    assert [any(n.startswith(f"{moved}.") for n in r["parts"]) for r in again] == [False, True]
    assert again[0]["forwards"] == 2 * first[0]["forwards"]  # each once more, for the backward pass
    for name, value in first[0]["weights"].items():
        torch.testing.assert_close(again[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_changed_places_of_experts(ranks2: RankGroup, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.yaml")
    first = ranks2.call(run, "ep2", path, kind="Mixture")

    def swap(data: Any) -> None:
        for plan in data["expert_plans"].values():
            plan["order"] = [3, 1, 2, 0]

    _edited(path, swap)
    again = ranks2.call(run, path, kind="Mixture")
    plans = pickle.loads(again[0]["plan"]).expert_plans.values()
    assert [plan.part(0, 2) for plan in plans] == [[3, 1]] * 4
    for name, value in first[0]["weights"].items():
        torch.testing.assert_close(again[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_whole_block_in_the_file_is_whole_in_the_run(ranks2: RankGroup, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.yaml")
    first = ranks2.call(run, "tp2", path)
    assert first[0]["parts"]["blocks.0.up.weight"] == (16, 16)

    def keep(data: Any) -> None:
        data["tensor_plan"]["units"]["blocks.0"] = {}
        for name in [n for n in data["tensor_plan"]["parameters"] if n.startswith("blocks.0.")]:
            del data["tensor_plan"]["parameters"][name]

    _edited(path, keep)
    again = ranks2.call(run, path)
    assert again[0]["parts"]["blocks.0.up.weight"] == (32, 16)
    assert again[0]["parts"]["blocks.1.up.weight"] == (16, 16)
    for name, value in first[0]["weights"].items():
        torch.testing.assert_close(again[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_plan_of_another_model_is_refused(ranks2: RankGroup, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.yaml")
    ranks2.call(run, "pp2", path)
    difference = r"parameter `stem.weight`: float32 \[16, 16\] in the plan, float32 \[24, 16\] in the model"
    with pytest.raises(RankError, match=f"another model than this Classifier.* {difference}.*layout='pp2'") as raised:
        ranks2.call(run, path, module_options={"width": 24})
    assert raised.value.kind == "PartitionError"

    def reorder(data: Any) -> None:
        data["stages"][0][0], data["stages"][0][1] = data["stages"][0][1], data["stages"][0][0]

    _edited(path, reorder)
    with pytest.raises(RankError, match=r"call 0 of `training_step`: `blocks.0` in the plan, `stem` in the model"):
        ranks2.call(run, path)
