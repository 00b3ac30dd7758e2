"""Every other recipe: the small ones run, shortened; the large ones are planned for their own number of devices."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from lightning_hybrid import Layout
from lightning_hybrid.checkpoint.consolidate import consolidate
from lightning_hybrid.data import SampleData
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.plan import make_partition
from tests.harness import RankGroup, start_fake_ranks
from tests.scripts import run_warm

pytestmark = pytest.mark.timeout(400)

RECIPES = Path(__file__).parents[2] / "recipes"
TIMEOUT_SECONDS = 180
STEPS = 4
LARGE = ("pretrain_dense_4b4", "pretrain_dense_1b6", "pretrain_deepseek_1b6", "parallel_streams_1b6")
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""The shape of Llama 3.1 with 8 B parameters, whose weights are not on this machine."""
QWEN_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
"""The shape of Qwen2.5 with 7 B parameters."""
T5_XL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
"""The shape of T5 v1.1 XL."""
APPLICATIONS: dict[str, tuple[dict[str, Any], float, str]] = {
    "chat_8b": (LLAMA_8B, 8.03e9, "fsdp8"),
    "code_completion_7b": (QWEN_7B, 7.62e9, "fsdp8"),
    "content_generation_8b": (LLAMA_8B, 8.03e9, "fsdp8-pp2"),
    "translation_3b": (T5_XL, 2.78e9, "fsdp8"),
    "tutoring_7b": (QWEN_7B, 7.62e9, "fsdp8"),
}
"""Recipes of applications at full size: the configuration in place of a pretrained model, parameters and layout."""


def fit(recipe: str, directory: Path, *arguments: str, devices: int = 4) -> str:
    """Run a recipe for some steps in a directory of its own; end its whole process group when it takes too long."""
    code, output = run_warm(
        *("-m", "lightning_hybrid.cli", "fit", "--config", str(RECIPES / f"{recipe}.yaml")),
        *(f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}", "--trainer.limit_val_batches=1"),
        *("--trainer.log_every_n_steps=1", *arguments),
        processes=devices,
        cwd=directory,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    assert code == 0, output[-5000:]
    return output


@pytest.mark.slow
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
    output = fit("pretrain_deepseek", tmp_path, *arguments, devices=devices)
    assert "of 16 experts" in output
    assert "Sample" in output
    assert "max_violation" in (tmp_path / "runs/pretrain_deepseek/version_0/metrics.csv").read_text()


def plan(recipe: str) -> Partition:
    """Plans a recipe for its own layout, as rank 0 of a fake process group, the weights on the meta device."""
    # the options that name the hardware; a machine without it can't make the Trainer
    args = ["--config", str(RECIPES / f"{recipe}.yaml"), "--trainer.accelerator=cpu", "--trainer.logger=false"]
    if recipe in APPLICATIONS:
        args[2:2] = ["--config", without_downloads(recipe)]
    sys.argv[1:] = []  # this rank's, with which Lightning warns: they are not its arguments
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
    start_fake_ranks(layout.devices)
    module: Any = cli.model
    with torch.device("meta"):
        module.configure_model()
    for owner in module.modules():
        for key, buffer in owner._buffers.items():
            owner._buffers[key] = None if buffer is None else torch.zeros(buffer.shape)
    module.trainer = cli.trainer
    batch, samples = first_batch(cli.datamodule, layout.replicas)
    sample = ("training_step", (batch, 0), samples)
    context = strategy.precision_plugin.forward_context
    return make_partition(
        module, strategy.request, Mesh.create(layout, "cpu"), torch.device("cpu"), context, lambda share: sample
    )


def without_downloads(recipe: str) -> str:
    """A file that puts a configuration and bytes in place of a pretrained model and its tokenizer."""
    config = APPLICATIONS[recipe][0]
    data: dict[str, Any] = {"samples": {"tokenizer": None}}
    if "tutoring" not in recipe:
        data["path"] = str(RECIPES)
    changes = {"data": {"init_args": data}, "model": {"init_args": {"path": None, "config": config}}}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        yaml.safe_dump(changes, file)
    return file.name


def first_batch(data: Any, replicas: int) -> tuple[Any, int]:
    """Returns a batch of a replica, as the data module makes them, and its number of samples."""
    if isinstance(data, SampleData):
        config = data.config
        size = config.batch_size if config.max_tokens is None else config.max_tokens // config.max_length
        ones = torch.ones(size // replicas, config.max_length, dtype=torch.long)
        return {"input_ids": ones, "attention_mask": ones, "labels": ones}, len(ones)
    tokens = torch.zeros(data.batch_size // replicas, data.context_length, dtype=torch.long)
    return (tokens, tokens), len(tokens)


def facts(recipe: str) -> dict[str, Any]:
    """What the plan of a recipe says; in a process of its own, for the process group's sake."""
    made = plan(recipe)
    inside = {n: p.numel() for n, p in made.root.named_parameters() if "embedding" not in n and "head" not in n}
    routed = sum(size for name, size in inside.items() if ".experts." in name)
    active = sum(inside.values()) - routed + routed * 6 // 64
    active -= sum(s for n, s in inside.items() if "further" in n and ".experts." not in n)  # serves training only
    return {
        "layout": str(made.plan.layout),
        "table": str(made.plan),
        "active": active,
        "experts": [p.experts for p in made.plan.expert_plans.values()],
        "stages": [len(stage.units) for stage in made.plan.stages],
        "parameters": sum(p.numel() for p in made.root.parameters()),
        "sharded": made.plan.record().get("sharded", []),
        "of_stages": [stage["parameters"] for stage in made.plan.record().get("stages", [])],
    }


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LARGE)
def test_plan_at_real_size(recipe: str) -> None:
    with RankGroup(1, timeout_seconds=150) as ranks:
        (found,) = ranks.call(facts, recipe)
    assert found["layout"] in found["table"]
    assert found["active"] == pytest.approx(4.353e9 if "4b4" in recipe else 1.571e9, rel=0.08)
    if "ep" in found["layout"]:
        assert found["experts"] == [64] * 36  # of 35 blocks and of the further token
    if "pp" in found["layout"]:
        assert found["stages"] == [19, 21]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", APPLICATIONS)
def test_plan_of_an_application_at_real_size(recipe: str) -> None:
    with RankGroup(1, timeout_seconds=150) as ranks:
        (found,) = ranks.call(facts, recipe)
    _, parameters, layout = APPLICATIONS[recipe]
    assert found["layout"] == layout
    assert found["layout"] in found["table"]
    assert found["parameters"] == pytest.approx(parameters, rel=0.01)
    assert any("1/8 a rank" in row for row in found["sharded"])
    if "pp" in layout:
        assert found["of_stages"] == pytest.approx([parameters / 2] * 2, rel=0.1)
        assert min(found["stages"]) > 10


@pytest.mark.slow
def test_phases(tmp_path: Path) -> None:
    """Each of one or two steps; the checkpoint has the streams."""
    phases = (
        "[{layout: dp4, sequence_length: 64}, {at_step: 1, sequence_length: 0}, "
        "{at_step: 2, layout: tp2-pp2, microbatches: 2, streams: 2}]"
    )
    output = fit("phases", tmp_path, f"--phases={phases}")
    assert "dp4 -> tp2-pp2: " in output
    assert "Phase 2 begins at step 2: layout=tp2-pp2, microbatches=2, streams=2." in output
    consolidate(tmp_path / "runs/phases/final.ckpt", tmp_path / "plain.ckpt")
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert state["transformer.blocks.0.attention.prefix.keys"].shape == (2, 4, 48, 32)
