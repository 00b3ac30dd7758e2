"""Every other recipe: the small ones run, shortened; the large ones are planned for their own number of devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_hybrid import Layout
from lightning_hybrid.checkpoint.consolidate import consolidate
from lightning_hybrid.execute.planning import Request, make_partition
from lightning_hybrid.observe.table import plan_table
from lightning_hybrid.partition.mesh import Mesh
from lightning_hybrid.partition.partition import Partition
from tests.harness import script_environment

pytestmark = [pytest.mark.recipes, pytest.mark.timeout(400)]

RECIPES = Path(__file__).parents[2] / "recipes"
TIMEOUT_SECONDS = 180
STEPS = 4
LARGE = ("pretrain_dense_4b4", "pretrain_dense_1b6", "pretrain_deepseek_1b6", "parallel_streams_1b6")


def fit(recipe: str, directory: Path, *arguments: str) -> str:
    """Run a recipe for some steps in a directory of its own; end its whole process group when it takes too long."""
    command = [sys.executable, "-m", "lightning_hybrid.cli", "fit", "--config", str(RECIPES / f"{recipe}.yaml")]
    command += [
        f"--trainer.max_steps={STEPS}",
        f"--trainer.val_check_interval={STEPS}",
        "--trainer.limit_val_batches=1",
    ]
    command += ["--trainer.log_every_n_steps=1", *arguments]
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output[-5000:]
    return output


def test_streams_follow_the_dense_model(tmp_path: Path) -> None:
    fit("pretrain_dense", tmp_path)
    consolidate(tmp_path / "runs/pretrain_dense/final.ckpt", tmp_path / "runs/pretrain_dense/plain.ckpt")
    output = fit("parallel_streams", tmp_path)
    assert f"{STEPS}/{STEPS}" in output
    consolidate(tmp_path / "runs/parallel_streams/final.ckpt", tmp_path / "plain.ckpt")
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert state["transformer.blocks.0.attention.prefix.keys"].shape == (4, 4, 16, 32)


@pytest.mark.parametrize(("layout", "devices"), [("ep2", 2), pytest.param("fsdp2-ep2", 4, marks=pytest.mark.slow)])
def test_the_scheme(tmp_path: Path, layout: str, devices: int) -> None:
    arguments = [f"--trainer.strategy.layout={layout}", f"--trainer.devices={devices}"]
    output = fit("pretrain_deepseek", tmp_path, *arguments)
    assert "of 16 experts" in output
    assert "Sample" in output
    assert "max_violation" in (tmp_path / "runs/pretrain_deepseek/version_0/metrics.csv").read_text()


@pytest.fixture
def fake_ranks() -> Iterator[Any]:
    """Starts a fake process group of any size, of which this process is rank 0."""

    def start(size: int) -> None:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def plan(recipe: str, fake_ranks: Any) -> Partition:
    """Plans a recipe for its own layout, the weights on the meta device."""
    # the options that name the hardware; a machine without it can't make the Trainer
    args = ["--config", str(RECIPES / f"{recipe}.yaml"), "--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        run=False,
        args=[*args, "--model.initial_weights=null"] if "streams" in recipe else args,
    )
    strategy: Any = cli.trainer.strategy
    layout: Layout = strategy.layout
    assert layout.devices == cli.trainer.num_devices * cli.trainer.num_nodes
    fake_ranks(layout.devices)
    module: Any = cli.model
    with torch.device("meta"):
        module.configure_model()
    for owner in module.modules():
        for key, buffer in owner._buffers.items():
            owner._buffers[key] = None if buffer is None else torch.zeros(buffer.shape)
    module.trainer = cli.trainer
    data: Any = cli.datamodule
    tokens = torch.zeros(data.batch_size // layout.replicas, data.context_length, dtype=torch.long)
    request = Request(layout=layout, schedule=strategy._schedule, microbatches=strategy._microbatches, tensor_plan=None)
    sample = ("training_step", ((tokens, tokens), 0))
    context = strategy.precision_plugin.forward_context
    return make_partition(module, request, Mesh.create(layout, "cpu"), torch.device("cpu"), context, lambda: sample)


@pytest.mark.parametrize("recipe", [pytest.param(x, marks=[] if "deepseek" in x else pytest.mark.slow) for x in LARGE])
def test_plan_at_real_size(recipe: str, fake_ranks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(recipe, fake_ranks)
    root: nn.Module = made.root
    inside = {n: p.numel() for n, p in root.named_parameters() if "embedding" not in n and "head" not in n}
    routed = sum(size for name, size in inside.items() if ".experts." in name)
    active = sum(inside.values()) - routed + routed * 6 // 64
    if "deepseek" in recipe:  # without the module for the further token, which serves training only
        active -= sum(s for n, s in inside.items() if "further" in n and ".experts." not in n)
    target = 4.353e9 if "4b4" in recipe else 1.571e9
    assert active == pytest.approx(target, rel=0.08)
    sizes = {name: made.parameters[name].numel() for name in made.parameters.names}
    table = plan_table(made.plan, sizes, made.switch.units.blocks, [])
    Console(width=110).print(table)
    assert str(made.plan.layout) in capsys.readouterr().out
    if made.plan.layout.ep > 1:
        assert {p.experts for p in made.expert_plans.values()} == {64}
        assert len(made.expert_plans) == 36  # of 35 blocks and of the further token
    if made.plan.layout.pp > 1:
        assert [len(stage.units) for stage in made.plan.stages] == [19, 21]
