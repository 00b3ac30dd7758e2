"""`read_rows`: rows of local JSONL, JSON, parquet and text files, and of folders, as dictionaries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Reads all rows of a file, or of all files of a folder, in sorted order.

    Args:
        path: One of

            - `.jsonl`: a JSON object per line; `.json`: a list of objects;
            - `.parquet`: a row per row (needs pyarrow);
            - `.txt`, `.md`, `.rst`, or a file without a suffix: one row, `{"text": content}`;
            - a folder that `datasets.Dataset.save_to_disk` has written (needs datasets);
            - any other folder: the files above in it and in its subfolders, others are skipped; `file` is the path in
              the folder, unless a row has this field.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a file cannot be read as its suffix says, or nothing is found.
    """
    path = existing(path)
    if path.is_file():
        return _reader(path)(path)
    if (path / "dataset_dict.json").exists():
        splits = sorted(part.name for part in path.iterdir() if part.is_dir())
        raise ValueError(
            f"`path` must be one split of a dataset. {path} has {', '.join(splits)}. Use {path}/{splits[0]}."
        )
    if (path / "state.json").exists():
        return _read_dataset(path)
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and file.suffix in _READERS and _shown(file, path)
    )
    rows = [{"file": str(file.relative_to(path))} | row for file in files for row in _reader(file)(file)]
    if not rows:
        raise ValueError(
            f"`path` must have files with {', '.join(filter(None, _READERS))} or no suffix. {path} has none."
        )
    return rows


def existing(path: str | Path, argument: str = "path") -> Path:
    """Returns the path with `~` expanded.

    Raises:
        FileNotFoundError: If there is no such file or folder; the message names the `argument`.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"`{argument}`: there is no file or folder {path}. Current folder: {Path.cwd()}.")
    return found


def existing_of_package(path: str, package: str, default: str, otherwise: str) -> Path:
    """Returns `existing(path)` for an argument whose `default` comes with a package of Debian.

    Raises:
        FileNotFoundError: If there is no such file or folder; the message names the package and what else to give.
    """
    if path == default and not Path(path).exists():
        raise FileNotFoundError(
            f"`path` is {path}, which comes with Debian's package {package}. Install it with `apt-get install "
            f"{package}`, or give {otherwise}."
        )
    return existing(path)


def _shown(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read_text(path: Path) -> list[Row]:
    return [{"text": path.read_text(encoding="utf-8", errors="replace")}]


def _read_json(path: Path) -> list[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this is not JSON: {error}. Name a file with an object per line `.jsonl`.") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path}: a JSON file must be a list of objects.")
    return content


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: this line is not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: each line must be a JSON object. Got {type(row).__name__}.")
            rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"`path` is a parquet file, {path}, which needs pyarrow. {needs('pyarrow')}") from None
    return parquet.read_table(path).to_pylist()


def _read_dataset(path: Path) -> list[Row]:
    try:
        from datasets import Dataset
    except ImportError:
        raise ValueError(f"`path` is a folder of datasets, {path}. {needs('datasets')}") from None
    return Dataset.load_from_disk(str(path)).to_list()


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    "": _read_text,
}


def _reader(path: Path) -> Callable[[Path], list[Row]]:
    if path.suffix not in _READERS:
        kinds = ", ".join(filter(None, _READERS))
        raise ValueError(f"`path` must have one of the suffixes {kinds}, or none for text. Got {path}.")
    return _READERS[path.suffix]


def needs(package: str) -> str:
    """Returns how to install a package of the extra `recipes`."""
    return f"Install it with `pip install {package}` or `pip install 'lightning-hybrid[recipes]'`."
