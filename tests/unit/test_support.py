"""The support table is made of what tests have shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import support
from tests.scripts import run_warm

ROOT = Path(__file__).parents[2]
IMPORTED = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""For the modules that the process has before pytest begins."""


def test_every_feature_of_the_table_has_a_test(tmp_path: Path) -> None:
    command = ("-m", "pytest", *IMPORTED, "--collect-only", "-q", "--list-features", "--rootdir", str(ROOT))
    folder = str(ROOT / "tests/distributed")
    code, listed = run_warm(*command, folder, processes=1, cwd=tmp_path, timeout_seconds=120)
    assert code == 0, listed
    tested = {line.removeprefix("feature: ") for line in listed.splitlines() if line.startswith("feature: ")}
    documented = support.features_in((ROOT / "docs/support.md").read_text())
    assert len(documented) > 20
    assert set(documented) == tested, "run the tests with `--support-table docs/support.md`"


TESTS = """
import pytest
from tests.support import refused

@pytest.mark.feature("shown", "shown too")
@pytest.mark.parametrize("layout", ["dp2", "pp2", "no column"])
def test_shown(layout): pass

@pytest.mark.feature("shown")
@pytest.mark.parametrize("layout", ["pp2"])
def test_fails(layout): assert False

@pytest.mark.feature(by="kind", prefix="kind: ")
@pytest.mark.parametrize("kind", ["a", "b"])
@pytest.mark.parametrize("layout", ["tp2"])
def test_kinds(request, layout, kind):
    if kind == "b":
        refused(request)

@pytest.mark.feature("never there", layout="dp2", refused=True)
def test_refused(): pass

def test_plain(): pass
"""


def test_the_table_has_what_was_shown(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{support.START}\nold\n{support.END}\nafter\n")
    options = [
        "--support-table",
        str(page),
        "-q",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
    ]
    command = ["-m", "pytest", *IMPORTED, "-c", str(ROOT / "pyproject.toml"), *options, str(tmp_path)]
    run_warm(*command, processes=1, cwd=tmp_path, timeout_seconds=120)
    text = page.read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert rows["shown"].startswith("| shown | yes |  |  | failed |")
    assert rows["shown too"].startswith("| shown too | yes |  |  | yes |")
    assert rows["kind: a"].startswith("| kind: a |  |  | yes |")
    assert rows["kind: b"].startswith("| kind: b |  |  | refused |")
    assert rows["never there"].startswith("| never there | refused |")
    assert support.features_in(text) == ["shown", "shown too", "kind: a", "kind: b", "never there"]
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_a_file_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="needs a file with the lines '<!-- support table -->'"):
        support.write(page, [])
