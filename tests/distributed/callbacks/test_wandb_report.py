"""What a run of Weights & Biases has beside values: plan, pictures, events; read back from an offline run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_hybrid.callbacks import wandb_report
from lightning_hybrid.spec.errors import PartitionError
from tests import wandb_files
from tests.distributed.callbacks import monitor_jobs as jobs
from tests.distributed.checkpoint.test_wandb import no_key
from tests.harness import RankGroup


class Run:
    """The only offline run in a folder."""

    def __init__(self, folder: Path) -> None:
        (self.path,) = wandb_files.files(folder)
        self.lines, self.config = wandb_files.read(self.path)

    def of(self, key: str) -> list[dict[str, Any]]:
        """The lines with a key."""
        return [line for line in self.lines if key in line]

    def tables(self, key: str) -> list[list[list[Any]]]:
        """The rows of the tables that were logged as `key`."""
        paths = [self.path.parent / "files" / line[key]["path"] for line in self.of(key)]
        return [json.loads(path.read_text())["data"] for path in paths]

    def is_picture(self, value: dict[str, Any]) -> bool:
        """Whether a logged value is a picture with a file."""
        data = (self.path.parent / "files" / value["path"]).read_bytes()
        return value["_type"] == "image-file" and data.startswith(b"\x89PNG")


def test_plan_pictures_and_events_are_in_the_run(ranks2: RankGroup, tmp_path: Path) -> None:
    values = ranks2.call(jobs.changing, "pp2", tmp_path)[0]
    run = Run(tmp_path)
    plans = wandb_files.values_of(run.path, "lightning_hybrid")
    assert list(dict.fromkeys(plan["layout"] for plan in plans)) == ["pp2", "dp2"], "that of the start, and the new one"
    assert run.config["lightning_hybrid"]["layout"] == "dp2", "the plan that is in force"
    first, second = run.tables("plan/table")
    assert [row[0] for row in first[:3]] == ["layout", "stage 0", "stage 1"]
    assert [table[0][2] for table in (first, second)] == ["pp2", "dp2"]
    pictures = run.of("plan/stage_balance")
    assert [line["trainer/global_step"] for line in pictures] == [3, 5]
    assert all(run.is_picture(line["plan/stage_balance"]) for line in pictures)
    (events,) = run.tables("events/table")[-1:]
    assert ["relayout", "pp2 -> dp2"] in [event[1:] for event in events]
    assert ["phase", "phase 1"] in [event[1:] for event in events]
    relayouts = [line["events/relayout"] for line in run.of("events/relayout")]
    assert relayouts == sorted(relayouts)
    assert [relayouts[0], relayouts[-1]] == [0, 1], "on the time axis"
    last = run.of("layout/pp")[-1]
    assert {k: v for k, v in last.items() if k in values} == pytest.approx(values)
    per_sample = values["throughput/tflops_per_device"] * 2e12 / values["throughput/samples_per_second"]
    assert per_sample == pytest.approx(jobs.of_one_process()["flops"]), "counted again in the new layout"
    # the same values in other loggers
    with (tmp_path / "csv/0/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("layout/pp")]
    assert {k: float(rows[-1][k]) for k in values} == pytest.approx(values)
    board = EventAccumulator(str(tmp_path / "tensorboard/0")).Reload()
    assert {k: board.Scalars(k)[-1].value for k in values} == pytest.approx(values, rel=1e-5)
    no_key(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "kind", "text"),
    [
        (jobs.resized, "batch_size", "16 -> 32 samples"),
        (jobs.rebalanced, "rebalancing", "replicas: a step should become "),
    ],
)
def test_changes_of_callbacks_are_events(ranks2: RankGroup, tmp_path: Path, job: Any, kind: str, text: str) -> None:
    changes = ranks2.call(job, tmp_path)[0]
    assert len(changes) == 1
    run = Run(tmp_path)
    (events,) = run.tables("events/table")
    ((step, found, change),) = events
    assert (step, found) == (changes[0]["step"], kind)
    assert change.startswith(text)
    counts = [(line["trainer/global_step"], line[f"events/{kind}"]) for line in run.of(f"events/{kind}")]
    assert counts[0][1] == 0
    assert next(logged for logged, count in counts if count == 1) in (step - 1, step, step + 1), "on the time axis"
    assert counts[-1][1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_the_noise_scale_is_that_of_the_callback(ranks2: RankGroup, layout: str) -> None:
    lines, scale = ranks2.call(jobs.noisy, layout)[0]
    assert scale is not None
    assert lines[-1]["batch/noise_scale"] == pytest.approx(scale)


@pytest.mark.slow
def test_the_load_of_experts_is_drawn(ranks2: RankGroup, tmp_path: Path) -> None:
    found, other = ranks2.call(jobs.experts, tmp_path)
    assert found["values"] == other["values"]
    tokens = [sum(counts) for counts in found["loads"].values()]
    assert tokens[0] > 0
    assert sum(tokens) / 4 == sum(found["read"]) / 6, "two readers do not take each other's counts"
    by_hand = [max(counts) * len(counts) / sum(counts) for counts in found["loads"].values()]
    assert found["values"]["experts/max_over_mean"] == pytest.approx(sum(by_hand) / len(by_hand))
    assert found["values"]["experts/max_over_mean_worst"] == pytest.approx(max(by_hand))
    of_ranks = [max(sum(counts[:2]), sum(counts[2:])) * 2 / sum(counts) for counts in found["loads"].values()]
    assert found["values"]["experts/max_over_mean_of_ranks"] == pytest.approx(max(of_ranks))
    run = Run(tmp_path)
    pictures = run.of("experts/load")
    assert len(pictures) == 2
    assert all(run.is_picture(line["experts/load"]) for line in pictures)


@pytest.mark.slow
def test_nothing_else_imports_wandb() -> None:
    code = "import sys, lightning_hybrid.cli, lightning_hybrid.callbacks; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# ---- every node, without a network


class Node:
    """Stands in for a Trainer on a node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, node: int, local_rank: int, mode: str = "shared") -> None:
        run = SimpleNamespace(id="abc", project="p", entity="", settings=SimpleNamespace(mode=mode))
        monkeypatch.setattr(wandb_report, "wandb_loggers", lambda _: [SimpleNamespace(experiment=run)])
        self.node_rank, self.local_rank, self.is_global_zero = node, local_rank, True
        self.strategy = SimpleNamespace(broadcast=lambda found: found)


def test_every_node_has_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **options: begun.append(options))
    for node, local_rank in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
        wandb_report.join_run(Node(monkeypatch, node, local_rank))  # type: ignore[arg-type]
    assert [options["settings"].x_label for options in begun] == ["node1", "node2"]
    for options in begun:
        assert options["id"] == "abc"
        assert options["settings"].mode == "shared"
        assert options["settings"].x_primary is False


def test_every_node_needs_a_shared_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PartitionError, match=r"`wandb_every_node=True` needs .*in the mode 'online'.*mode='shared'"):
        wandb_report.join_run(Node(monkeypatch, 0, 0, "online"))  # type: ignore[arg-type]


def test_without_matplotlib_there_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    table = wandb_report.expert_picture({"a": [1, 3]})
    assert table.data == [["a", 0, 0.5], ["a", 1, 1.5]]
    assert type(wandb_report.stage_picture([0.25, 0.75], [0.5, 0.5])).__name__ == "CustomChart"
