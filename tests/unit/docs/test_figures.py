"""The figures are what docs/figures/draw.py draws."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

FIGURES = Path(__file__).parents[3] / "docs/figures"


def test_the_figures_are_those_of_the_script() -> None:
    drawn = {f"{figure.__name__}.svg": figure().svg() for figure in runpy.run_path(str(FIGURES / "draw.py"))["FIGURES"]}
    for name, svg in drawn.items():
        assert (FIGURES / name).read_text() == svg, "run `python docs/figures/draw.py`"
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_pages_show_every_figure() -> None:
    text = "".join(page.read_text() for page in FIGURES.parent.glob("*.md"))
    for path in FIGURES.glob("*.svg"):
        assert f"](figures/{path.name})" in text
