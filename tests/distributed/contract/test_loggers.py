"""Loggers have one writer, the values of one process, and the layout and the plan in their configuration."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import wandb_files
from tests.distributed.contract import jobs
from tests.distributed.contract.layouts import FOUR, TWO, assert_equal, call
from tests.harness import RankGroup
from tests.pairwise import quick


def read_wandb(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines and the configuration in the only W&B run of a folder."""
    (path,) = wandb_files.files(folder)
    return wandb_files.read(path)


def read_csv(folder: Path) -> list[dict[str, float]]:
    with (folder / "csv/0/metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    (_,) = (folder / "tensorboard/0").glob("events.*")
    events = EventAccumulator(str(folder / "tensorboard/0")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loggers")
    with RankGroup(1) as rank:  # W&B starts a process of its own, which is better not the tests'
        rank.call(jobs.loggers, None, str(folder))
    return folder


@pytest.mark.feature("CSV, TensorBoard and W&B loggers, with the plan in the configuration")
@pytest.mark.parametrize("layout", quick([*TWO, *FOUR], "pp2"))
def test_loggers(request: pytest.FixtureRequest, tmp_path: Path, one_process: Path, layout: str) -> None:
    call(request, layout, jobs.loggers, str(tmp_path))
    assert_equal(read_csv(tmp_path), read_csv(one_process), "csv")
    assert_equal(read_tensorboard(tmp_path), read_tensorboard(one_process), "tensorboard")
    lines, config = read_wandb(tmp_path)
    expected, plain = read_wandb(one_process)
    assert len(expected) > 6
    assert_equal(lines, expected, "wandb")
    plan = config["lightning_hybrid"]
    assert config["width"] == plain["width"] == 16
    _assert_plan(plan, layout)
    saved = yaml.safe_load((tmp_path / "csv/0/hparams.yaml").read_text())
    assert saved == {"width": 16, "lightning_hybrid": plan}
    assert "lightning_hybrid" in (tmp_path / "tensorboard/0/hparams.yaml").read_text()


def _assert_plan(plan: dict[str, Any], layout: str) -> None:
    assert plan["layout"] == layout
    assert plan["devices"] == (4 if "-" in layout else 2)
    if "pp" in layout:
        assert plan["schedule"] == "1F1B"
        assert plan["microbatches"] > 1
        assert [stage["rank"] for stage in plan["stages"]] == [0, 1]
        assert sum(stage["parameters"] for stage in plan["stages"]) == 4628
        assert plan["stages"][0]["first_module"] == "stem"
    if "fsdp" in layout:
        assert any("1/2 a rank" in row for row in plan["sharded"])
    if "tp" in layout:
        assert any("up" in row for row in plan["sharded"])


@pytest.mark.feature("`WandbLogger.watch` (rank 0's part)")
@pytest.mark.parametrize("layout", quick([*TWO, *FOUR], "pp2"))
def test_watching_a_model_does_not_hang(request: pytest.FixtureRequest, tmp_path: Path, layout: str) -> None:
    assert call(request, layout, jobs.loggers, str(tmp_path), watch=True) == [6] * (4 if "-" in layout else 2)
    lines, _ = read_wandb(tmp_path)
    # in a pipeline the first stage never returns from the module's forward, after which W&B looks at parameters
    kind = "gradients/" if "pp" in layout else "parameters/"
    assert any(k.startswith(kind) for line in lines for k in line), "histograms of rank 0's part"
