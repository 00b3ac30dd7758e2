"""Rows of local files and folders."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_hybrid.data import read_rows

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_json_lines_json_and_parquet_have_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        assert read_rows(tmp_path / name) == ROWS


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    assert read_rows(tmp_path / "one") == ROWS
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        ValueError, match=r"`path` must be one split of a dataset\. .* has train\. Use .*splits/train\."
    ):
        read_rows(tmp_path / "splits")
    assert read_rows(tmp_path / "splits/train") == ROWS


def test_a_folder_of_files_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/plain", "a.txt", ".git/hidden", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_text(json.dumps(ROWS[0]))
    assert read_rows(tmp_path) == [
        {"file": "a.txt", "text": "a.txt"},
        {"file": "b/plain", "text": "b/plain"},
        {"file": "c.jsonl", **ROWS[0]},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a":', r"x\.jsonl:2: this line is not JSON"),
        ("x.jsonl", "[1]", r"x\.jsonl:1: each line must be a JSON object\. Got list"),
        ("x.json", '{"a": 1}', "a JSON file must be a list of objects"),
        ("x.json", '{"a": 1}\n{"a": 2}', r"this is not JSON: .* with an object per line `\.jsonl`"),
        ("x.csv", "a,b", r"`path` must have one of the suffixes \.jsonl, .*\. Got .*x\.csv"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`path`: there is no file or folder .*none\.jsonl"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"`path` must have files with \.jsonl, .* has none"):
        read_rows(tmp_path)


@pytest.mark.parametrize(("name", "package"), [("x.parquet", "pyarrow"), ("state.json", "datasets")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    (tmp_path / name).touch()
    imported = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.partition(".")[0] == package:
            raise ImportError(module)
        return imported(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=rf"`pip install {package}` or `pip install 'lightning-hybrid\[recipes\]'`"):
        read_rows(tmp_path / name if name.startswith("x") else tmp_path)
