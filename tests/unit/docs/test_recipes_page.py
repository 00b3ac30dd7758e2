"""Compares docs/recipes.md and README.md with the files of the recipes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.documents import ROOT

PAGE = (ROOT / "docs/recipes.md").read_text()
RESULTS = re.findall(r"^\| `(\w+)` \| .*`([\w-]+)` \| (\d+) \|", PAGE, re.MULTILINE)
SECTIONS = re.findall(
    r"^## [^\n`]+: `(\w+)`(?:, `(\w+)`)?(?:, `(\w+)`)?\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
)
LARGE = [(name, text) for *names, text in SECTIONS for name in names if re.search(r"_\d+b$", name)]


def _trainer(recipe: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"recipes/{recipe}.yaml").read_text())["trainer"]


def test_every_application_is_there() -> None:
    assert len(RESULTS) == 6
    assert len(LARGE) == 5
    for recipe in [*(name for name, *_ in RESULTS), *(name for name, _ in LARGE)]:
        assert f"`{recipe}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("recipe", "layout", "steps"), RESULTS)
def test_layout_and_steps_of_the_results(recipe: str, layout: str, steps: str) -> None:
    trainer = _trainer(recipe)
    assert trainer["strategy"]["init_args"]["layout"] == layout
    assert trainer["max_steps"] == int(steps)
    assert trainer["accelerator"] == "cpu"


@pytest.mark.parametrize(("recipe", "text"), LARGE, ids=[name for name, _ in LARGE])
def test_layout_and_devices_at_full_size(recipe: str, text: str) -> None:
    trainer = _trainer(recipe)
    (sentence,) = re.findall(rf"^`{recipe}` .*", text, re.MULTILINE)
    devices = trainer["devices"] * trainer.get("num_nodes", 1)
    assert f"`{trainer['strategy']['init_args']['layout']}` on {devices} GPUs" in sentence
    assert trainer["accelerator"] == "gpu"
