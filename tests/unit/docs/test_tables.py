"""Code in the tables of docs/coming-from.md: what is under "after" can be made, and what is under "before" exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from lightning_hybrid import Layout
from tests.document_names import names
from tests.documents import ROOT

TEXT, _, _ = (ROOT / "docs/coming-from.md").read_text().partition("## What was run")
ROWS = re.findall(r"^\| (?!before|---)(.+) \| (.+) \|$", TEXT, re.MULTILINE)
AFTER = list(dict.fromkeys(code for _, after in ROWS for code in re.findall(r"`([^`]+)`", after)))
MADE = [code for code in AFTER if re.match(r"[A-Z]\w+\(", code) and "..." not in code]
OPTIONS = [code for code in AFTER if re.match(r"[a-z_]+=.", code)]
LAYOUTS = [code for code in AFTER if re.fullmatch(r'"(?:[a-z]+\d+-?)+"', code)]


def _names() -> dict[str, Any]:
    def trainer(devices: int = 1, precision: str = "32-true", plugins: Any = (), **options: Any) -> L.Trainer:
        """Makes a Trainer for a machine without accelerators."""
        return L.Trainer(accelerator="cpu", devices=devices, logger=False, **options)

    return names() | {"Trainer": trainer, "replicas": 8, "path": "runs"}


def test_there_is_code() -> None:
    assert len(ROWS) > 60
    assert len(MADE) > 20


@pytest.mark.parametrize("code", MADE)
def test_objects_can_be_made(code: str) -> None:
    assert eval(code, _names()) is not None


@pytest.mark.parametrize("code", OPTIONS)
def test_options_are_those_of_the_strategy(code: str) -> None:
    assert eval(f"HybridStrategy({code})", _names()) is not None


@pytest.mark.parametrize("code", LAYOUTS)
def test_layouts_can_be_read(code: str) -> None:
    assert Layout.parse(code.strip('"')).devices > 1


# ---- what is under "before"

_CODE = re.compile(r"`([^`]+)`")
_SECTIONS = dict(re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
BEFORE = {
    title: [
        code
        for before, _ in re.findall(r"^\| (?!before|---)(.+) \| (.+) \|$", text, re.MULTILINE)
        for code in _CODE.findall(before)
    ]
    for title, text in _SECTIONS.items()
}
"""Code of the left columns, by section."""
PACKAGES: dict[str, tuple[str, ...]] = {
    "DeepSpeed": ("deepspeed",),
    "NeMo and Megatron": ("nemo", "megatron"),
    "torchtitan": ("torchtitan",),
    "accelerate and the Trainer of transformers": ("accelerate", "transformers"),
}
"""Packages that a section names, besides torch and Lightning."""
OWN = {"dataset", "loader", "loss", "module", "model", "optimizer", "train", "path", "checkpoint", "config", "layers"}
"""Names of a user, not of a library."""
MADE_BEFORE = [
    code
    for title in ("Lightning with DDP", "FSDP and ModelParallelStrategy")
    for code in BEFORE[title]
    if re.match(r"[A-Z]\w+\(", code) and "..." not in code
]


@pytest.mark.parametrize("code", MADE_BEFORE)
def test_objects_of_torch_and_lightning_can_be_made(code: str) -> None:
    known = {"DDPStrategy": DDPStrategy, "FSDPStrategy": FSDPStrategy, "ModelParallelStrategy": ModelParallelStrategy}
    others = {"default_hooks": default_hooks, "MixedPrecisionPolicy": MixedPrecisionPolicy, "Block": torch.nn.Linear}
    plans = {"ColwiseParallel": ColwiseParallel, "RowwiseParallel": RowwiseParallel}
    assert eval(code, _names() | known | others | plans) is not None


def test_options_of_fsdp_can_be_given() -> None:
    options = [code for code in BEFORE["FSDP and ModelParallelStrategy"] if re.match(r"[a-z_]+=.", code)]
    assert len(options) > 4
    for code in options:
        given = eval(f"dict({code})", {"Block": torch.nn.Linear})
        assert FSDPStrategy(**{"auto_wrap_policy": {torch.nn.Linear}, **given}) is not None


def _source(package: str) -> str:
    """Returns the code of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    files = (file for place in spec.submodule_search_locations for file in Path(place).rglob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("title", PACKAGES)
def test_names_of_other_libraries_exist(title: str) -> None:
    known = set(re.findall(r"\w+", "\n".join(_source(package) for package in (*PACKAGES[title], "lightning"))))
    named = {name for code in BEFORE[title] for name in re.findall(r"[A-Za-z_]{4,}\w*", code)}
    assert len(named) > 20
    assert sorted(named - known - OWN) == []
