"""The quickstart recipe, shortened: it trains on four processes, and every layout gives the same losses."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lightning_hybrid.checkpoint.consolidate import consolidate
from lightning_hybrid.models import CausalLM
from tests.scripts import run_python, run_warm

pytestmark = pytest.mark.timeout(400)

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
STEPS = 6
TIMEOUT_SECONDS = 180


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run of the recipe left behind."""

    directory: Path
    output: str
    train_losses: list[float]
    validation_bits: list[float]

    @property
    def checkpoint(self) -> Path:
        """As one plain file."""
        plain = self.directory / "plain.ckpt"
        if not plain.exists():
            (checkpoint,) = self.directory.rglob("*.ckpt")
            consolidate(checkpoint, plain)
        return plain


RunRecipe = Callable[[str, int], Run]


def command_line(subcommand: str, *arguments: str) -> tuple[str, ...]:
    """What follows `python`."""
    return ("-m", "lightning_hybrid.cli", subcommand, "--config", str(RECIPE), *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecipe:
    """Run the recipe under a layout, once for all tests of this module."""
    runs: dict[str, Run] = {}

    def run_once(layout: str, devices: int) -> Run:
        if layout not in runs:
            runs[layout] = train(layout, devices, tmp_path_factory.mktemp(layout))
        return runs[layout]

    return run_once


def train(layout: str, devices: int, directory: Path) -> Run:
    command = command_line(
        "fit",
        f"--trainer.strategy.layout={layout}",
        f"--trainer.devices={devices}",
        f"--trainer.max_steps={STEPS}",
        f"--trainer.val_check_interval={STEPS // 2}",
        "--trainer.limit_val_batches=2",
        "--trainer.log_every_n_steps=1",
    )
    code, output = run_warm(*command, processes=devices, cwd=directory, timeout_seconds=TIMEOUT_SECONDS)
    assert code == 0, output[-5000:]
    (metrics,) = directory.rglob("metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    return Run(
        directory=directory,
        output=output,
        train_losses=[float(row["train_loss"]) for row in rows if row["train_loss"]],
        validation_bits=[float(row["val_bits_per_byte"]) for row in rows if row["val_bits_per_byte"]],
    )


def test_recipe_shows_plan_progress_and_sample(run: RunRecipe) -> None:
    quickstart = run("dp2-pp2", 4)
    assert "dp2-pp2" in quickstart.output
    assert f"{STEPS}/{STEPS}" in quickstart.output
    assert "train_loss=" in quickstart.output
    assert "Sample" in quickstart.output
    for noise in ("[rank: ", "Initializing distributed", "All distributed processes", "LeafSpec", "Tip:"):
        assert noise not in quickstart.output, quickstart.output
    assert len(quickstart.train_losses) == STEPS
    assert len(quickstart.validation_bits) == 2
    assert quickstart.train_losses[-1] < quickstart.train_losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "devices"), [("dp2-pp2", 4), ("tp2-pp2", 4)])
def test_layout_does_not_change_the_losses(run: RunRecipe, layout: str, devices: int) -> None:
    alone, together = run("dp1", 1), run(layout, devices)
    assert together.train_losses == pytest.approx(alone.train_losses, rel=1e-5)
    assert together.validation_bits == pytest.approx(alone.validation_bits, rel=1e-5)


def test_checkpoint_of_a_pipeline_is_that_of_one_process(run: RunRecipe) -> None:
    alone, together = (
        torch.load(run(layout, devices).checkpoint, weights_only=True)["state_dict"]
        for layout, devices in (("dp1", 1), ("dp2-pp2", 4))
    )
    assert list(together) == list(alone)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=1e-5)


def test_checkpoint_loads_without_the_strategy(run: RunRecipe) -> None:
    model = CausalLM.load_from_checkpoint(run("dp2-pp2", 4).checkpoint, map_location="cpu")
    assert model.generate(torch.tensor([list(b"def ")]), 4).shape == (1, 8)


@pytest.mark.slow
def test_layout_that_does_not_match_the_devices_is_refused_at_once(tmp_path: Path) -> None:
    command = command_line("fit", "--trainer.strategy.layout=dp3")
    code, output = run_python(*command, cwd=tmp_path, timeout_seconds=TIMEOUT_SECONDS)
    assert code != 0
    assert "`layout` must use every device once. Got 'dp3'" in output
    assert output.count("`layout` must use every device once") <= 2
