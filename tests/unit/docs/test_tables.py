"""Code in the tables of docs/coming-from.md: what stands under "after" can be made."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as L
import pytest

from lightning_hybrid import Layout
from tests.document_names import names
from tests.documents import ROOT

ROWS = re.findall(r"^\| (?!before|---)(.+) \| (.+) \|$", (ROOT / "docs/coming-from.md").read_text(), re.MULTILINE)
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
