"""`Trainer(strategy="hybrid")`, with and without a layout, in both packages of Lightning."""

from __future__ import annotations

import lightning.pytorch
import pytest
import pytorch_lightning

from lightning_hybrid import HybridStrategy
from tests.scripts import run_python

PACKAGES = [lightning.pytorch, pytorch_lightning]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize(("name", "devices", "layout"), [("hybrid", 2, "fsdp2"), ("hybrid-tp2-pp2", 4, "tp2-pp2")])
def test_a_name_makes_the_strategy(package, name: str, devices: int, layout: str) -> None:
    trainer = package.Trainer(accelerator="cpu", devices=devices, strategy=name, logger=False)
    assert isinstance(trainer.strategy, HybridStrategy)
    assert str(trainer.strategy.layout) == layout
    again = package.Trainer(accelerator="cpu", devices=devices, strategy=name, logger=False)
    assert again.strategy is not trainer.strategy


def test_an_unknown_layout_and_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown axis 'td'. Did you mean 'tp2'?"):
        lightning.pytorch.Trainer(strategy="hybrid-td2", logger=False)
    with pytest.raises(ValueError, match="invalid strategy name"):
        lightning.pytorch.Trainer(strategy="hybridtp2", logger=False)


SCRIPT = """
import sys
import importlib.util
import lightning_hybrid
assert "torch" not in sys.modules and "lightning" not in sys.modules
assert importlib.util.find_spec("{package}.strategies")  # does not import it
import {package} as pl
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="hybrid-dp2", logger=False)
left = [f for f in sys.meta_path if "AfterImport" in str(f) and f._name.startswith("{package}")]
print(type(trainer.strategy).__name__, trainer.strategy.layout, left)
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_may_be_imported_later(package: str) -> None:
    code, output = run_python("-c", SCRIPT.format(package=package), timeout_seconds=120)
    assert code == 0, output
    assert "HybridStrategy dp2 []" in output
