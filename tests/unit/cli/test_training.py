"""The command line on one process, with everything given by class path."""

import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from safetensors.torch import load_file
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lightning_hybrid.callbacks.save_config import redacted
from lightning_hybrid.checkpoint.content import Content, Part, RankFiles
from lightning_hybrid.checkpoint.manifest import WritingRanks, write_checkpoint
from lightning_hybrid.cli import main
from lightning_hybrid.spec.tensor_index import whole_index

CONFIG = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_hybrid.models.CausalLM",
        "init_args": {
            "transformer": {"width": 16, "blocks": 1, "heads": 1, "context_length": 8},
            "optimizer": {"warmup_steps": 1},
        },
    },
    "data": {
        "class_path": "lightning_hybrid.data.StdlibText",
        "init_args": {"batch_size": 4, "context_length": 8, "evaluation_windows": 8},
    },
    "trainer": {
        "strategy": "auto",
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "val_check_interval": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hybrid"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    # `seed_everything` sets it for the processes that it expects to be started.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    path = tmp_path / "tiny.yaml"  # the command line saves a complete config.yaml
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_fit_leaves_a_checkpoint_that_the_other_subcommands_take(config: Path) -> None:
    main(["fit", "--config", str(config)])
    (checkpoint,) = config.parent.rglob("*.ckpt")
    assert "transformer.head.weight" in torch.load(checkpoint, weights_only=True)["state_dict"]
    for subcommand in ("validate", "test", "predict"):
        main([subcommand, "--config", str(config), "--ckpt_path", str(checkpoint)])


def test_options_override_the_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(config), "--trainer.max_steps=7", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 7


NESTED = """
from dataclasses import dataclass

import lightning as L


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: int | None = 3
    table: dict[str, int | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Samples:
    tokenizer: str | None = "bytes"
    roles: list[str | None] | None = None
    inner: Inner = Inner()


class Part:
    def __init__(self, width: int | None = 2, depth: int = 1):
        pass


class Data(L.LightningDataModule):
    def __init__(self, samples: Samples = Samples(), part: Part | None = None, more: dict | None = None):
        super().__init__()
"""


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("samples.tokenizer=null", None),
        ("samples.tokenizer=None", "None"),  # a text, as in YAML
        ("samples.tokenizer=007", "007"),
        ("samples.roles=[null, user]", [None, "user"]),
        ("samples.inner.number=null", None),
        ("samples.inner.table={a: null, b: 1}", {"a": None, "b": 1}),
        ("part.init_args.width=null", None),
        ("more.key=null", None),
    ],
)
def test_values_of_nested_options_are_those_of_the_text(
    config: Path, option: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "nested.py").write_text(NESTED)
    data = ("--data=nested.Data", "--data.part=nested.Part", "--data.part.depth=3", f"--data.{option}")
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(config), *data, "--print_config"])
    sys.modules.pop("nested", None)
    found = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert found["part"]["init_args"]["depth"] == 3
    for key in option.partition("=")[0].split("."):
        found = found[key]
    assert found == value


def test_arguments_are_those_of_the_process_by_default(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-hybrid", "validate", "--config", str(config)])
    main()


def test_checkpoint_commands(tmp_path, capsys):
    content = Content(
        document={"epoch": 0, "global_step": 3, "names": ["w"], "aliases": {}, "streams": {}},
        parts=[Part(group="state_dict", name="w", shape=(2,), index=whole_index((2,)), tensor=torch.ones(2))],
    )
    ranks = WritingRanks(store=HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=5))
    about = {"step": 3, "epoch": 0, "layout": "dp1"}
    path = tmp_path / "a.ckpt"
    write_checkpoint(ranks, 1, path, RankFiles.of(content), about, lambda: None)
    main(["check", str(path)])
    assert "a.ckpt is intact: step 3, epoch 0, layout dp1, 1 ranks" in capsys.readouterr().out
    main(["verify", str(path)])  # its old name
    captured = capsys.readouterr()
    assert "is intact" in captured.out
    assert captured.err == "note: `verify CHECKPOINT` is called `check CHECKPOINT` now.\n"
    main(["consolidate", str(path), str(tmp_path / "out.safetensors")])
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], torch.ones(2))
    (path / "rank-00000.safetensors").unlink()
    with pytest.raises(SystemExit, match="1"):
        main(["check", str(path)])
    assert re.match(r"error: .*rank-00000.safetensors \(rank 0\) is missing", capsys.readouterr().err)


KEY = "0123456789abcdef0123456789abcdef01234567"


# jsonargparse has no text for the default of an argument of W&B that is deprecated.
@pytest.mark.filterwarnings("ignore:\\s*Unable to serialize instance")
def test_keys_never_reach_a_saved_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the logger whose settings have a key")
    content = yaml.safe_load(config.read_text())
    content["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"offline": True, "save_dir": "runs", "settings": {"api_key": KEY, "mode": "offline"}},
    }
    config.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("WANDB_API_KEY", KEY[::-1])
    try:
        main(["fit", "--config", str(config)])
    finally:
        wandb.finish()
        wandb.teardown()
    files = [path for path in config.parent.rglob("*") if path.is_file() and path != config]
    (saved,) = [path for path in files if path.name == "config.yaml" and "trainer" in path.read_text()]
    logger = yaml.safe_load(saved.read_text())["trainer"]["logger"]
    assert logger["init_args"]["settings"]["api_key"] is None
    assert logger["init_args"]["save_dir"] == "runs"
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
        assert KEY[::-1].encode() not in path.read_bytes(), path


def test_secrets_are_found_wherever_they_are() -> None:
    tree = {
        "a": [{"api_key": KEY, "API-KEY": 1}, Namespace(auth_token=KEY, tokens=5, tokenizer="x")],
        "password": {"of": KEY},
        "monkey": 1,
        "key": "kept",
    }
    assert redacted(tree) == {
        "a": [{"api_key": None, "API-KEY": 1}, Namespace(auth_token=None, tokens=5, tokenizer="x")],
        "password": None,
        "monkey": 1,
        "key": "kept",
    }
