"""Byte-level language modeling on Python source files: selection of files and windows.

A token is a byte: 256 values, no tokenizer, and every file can be read.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

BYTE_VOCABULARY = 256
"""Number of values of a byte."""


def stdlib_modules() -> list[str]:
    """Return the names of the standard library's top-level packages and single-file modules, sorted.

    Only modules with Python source on disk are listed, without third-party packages.
    """
    root = _stdlib_root()
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    single_files = {path.stem for path in root.glob("*.py")}
    return sorted(name for name in packages | single_files if name.isidentifier())


def stdlib_sources(modules: Sequence[str]) -> list[Path]:
    """Return the Python source files of standard library modules, in the same order on every machine.

    Args:
        modules: Names of top-level packages or single-file modules, such as ``"email"`` or ``"argparse"``.

    Returns:
        The files, by module in sorted order and then by path inside it.

    Raises:
        ValueError: If a name is not a module of this interpreter's standard library.
    """
    root = _stdlib_root()
    files: list[Path] = []
    for module in sorted(modules):
        single_file = root / f"{module}.py"
        package = sorted((root / module).rglob("*.py"), key=lambda path: path.relative_to(root).parts)
        found = package or ([single_file] if single_file.is_file() else [])
        if not found:
            raise ValueError(
                f"`modules` must name packages or modules of the standard library in {root}. "
                f"Got {module!r}, which has no Python source there. `stdlib_modules()` lists those that do."
            )
        files += found
    return files


def read_bytes(files: Sequence[Path]) -> Tensor:
    """Read files as one sequence of bytes.

    Args:
        files: The files, in the order in which they are joined. A newline follows each.

    Returns:
        The bytes, of shape ``(bytes,)`` and dtype ``uint8``.
    """
    content = b"".join(path.read_bytes() + b"\n" for path in files)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of fixed length over a text, with the following byte of every position.

    Args:
        text: The text's bytes, of shape ``(bytes,)`` and dtype ``uint8``.
        context_length: Bytes in a window, T.
        limit: Number of windows, evenly spaced over the text; None: all.
    """

    def __init__(self, text: Tensor, context_length: int, limit: int | None = None) -> None:
        # The last byte of a window predicts the first of the next one: T inputs need T + 1 bytes.
        windows = (len(text) - 1) // context_length
        if windows < 1:
            raise ValueError(
                f"`context_length` must leave room for a window of {context_length} + 1 bytes. "
                f"Got a text of {len(text)} bytes. Use a shorter context or more text."
            )
        self._text = text
        self._context_length = context_length
        kept = windows if limit is None else min(limit, windows)
        self._starts = [index * windows // kept * context_length for index in range(kept)]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a window's bytes and the bytes that follow them, each of shape ``(T,)`` and dtype ``int64``."""
        start = self._starts[index]
        window = self._text[start : start + self._context_length + 1].long()
        return window[:-1], window[1:]


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))
