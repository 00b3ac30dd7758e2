"""`CodeData`: Python code with gaps to be filled in, and tasks that run the doctests of functions.

Reference:
    Bavarian et al., Efficient Training of Language Models to Fill in the Middle, arXiv:2207.14255.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from lightning_hybrid.data.doctests import documented_functions, passes, tokens_in
from lightning_hybrid.data.files import existing
from lightning_hybrid.data.sample_data import SampleConfig, SampleData
from lightning_hybrid.data.samples import IGNORED, Sample, Task
from lightning_hybrid.data.stdlib import TABLES
from lightning_hybrid.data.text import stdlib_modules, stdlib_sources

STDLIB = "stdlib"
"""Value of `path` for the standard library of this interpreter."""
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
"""Special tokens of the byte tokenizer; those of Qwen2.5-Coder have the same names."""


_WORD = re.compile(r"[A-Za-z_]\w+")


@dataclass(frozen=True)
class Code:
    """A part of a file."""

    file: Path
    text: str


class CodeData(SampleData[Code]):
    """Python files in parts of at most `samples.max_length` tokens, most of them with a gap.

    A part with a gap is ``prefix suffix middle`` (PSM) or ``suffix prefix middle`` (SPM, section 3 of the paper's
    variant: the middle continues the prefix), with the special tokens before each.

    Tasks are functions of held-out files whose doctests pass. A gap replaces one word of the function. The answer fills
    the gap. A task is solved if the doctests of the function pass: pass@1. The code runs in a separate process with a
    time-out and limits of memory and files, which is no protection against malicious code.

    Args:
        path: Folder of Python files, or `stdlib` for the standard library of this interpreter.
        held_out: Files or packages, by name without `.py`, that are held out.
        fim_rate: Share of the parts that have a gap.
        spm_rate: Share of the gaps in the order SPM.
        word_rate: Share of the gaps that are one word, as in the tasks; the others begin and end anywhere.
        loss: `all`: all tokens of a part with a gap have a loss, as in the paper. `middle`: only those of the gap.
        fim_tokens: Names of the special tokens before prefix, suffix and middle.
        samples: How samples are tokenized, divided and batched. Files are held out by `held_out` only.

    Raises:
        ValueError: If a rate is not a share, or the tokenizer lacks one of `fim_tokens`.
    """

    def __init__(
        self,
        path: str = STDLIB,
        held_out: Sequence[str] = ("collections", "difflib", "fractions", "heapq", "pickletools", "secrets", "shutil"),
        fim_rate: float = 0.9,
        spm_rate: float = 0.5,
        word_rate: float = 0.0,
        loss: Literal["all", "middle"] = "all",
        fim_tokens: tuple[str, str, str] = FIM_TOKENS,
        samples: SampleConfig = SampleConfig(),  # noqa: B008 -- frozen
    ) -> None:
        super().__init__(samples)
        for name, value in (("fim_rate", fim_rate), ("spm_rate", spm_rate), ("word_rate", word_rate)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be at least 0 and at most 1. Got {value}.")
        if loss not in ("all", "middle"):
            raise ValueError(f"`loss` must be all or middle. Got {loss!r}.")
        self._folder = None if path == STDLIB else existing(path)
        self._held_out, self._fim_rate, self._spm_rate = frozenset(held_out), fim_rate, spm_rate
        self._word_rate, self._loss = word_rate, loss
        self._prefix, self._suffix, self._middle = (self.tokenizer.special(name) for name in fim_tokens)

    def items(self) -> list[Code]:
        """Returns parts of all files, each of whole lines."""
        return [Code(file, part) for file in self._files() for part in self._parts(_read(file))]

    def key(self, item: Code) -> str:
        """Returns the path of the file."""
        return str(item.file)

    def is_held_out(self, item: Code) -> bool:
        """Returns True for the files that `held_out` names."""
        return self._names(item.file) & self._held_out != set()

    def sample(self, item: Code) -> Sample:
        """Returns the part with a gap at a random place, which depends on the text and the seed only."""
        chance = random.Random(zlib.crc32(f"{self.config.seed} {item.text}".encode()))
        if chance.random() >= self._fim_rate or len(item.text) < 3:
            tokens = [*self.tokenizer.encode(item.text), self.tokenizer.end]
            return Sample(tokens, tokens)
        start, end = self._gap(item.text, chance)
        before, middle, after = (
            self.tokenizer.encode(text) for text in (item.text[:start], item.text[start:end], item.text[end:])
        )
        tokens = [*self._arranged(before, after, chance.random() < self._spm_rate), *middle, self.tokenizer.end]
        unlabeled = len(tokens) - len(middle) - 1 if self._loss == "middle" else 0
        return Sample(tokens, [IGNORED] * unlabeled + tokens[unlabeled:])

    def tasks(self, count: int) -> list[Task]:
        """Returns gaps in functions of held-out files, in an order given by the seed."""
        files = [file for file in self._files() if self._names(file) & self._held_out]
        found = [(file, name, place) for file in files for name, place in documented_functions(_read(file))]
        chance = random.Random(self.config.seed)
        chance.shuffle(found)
        return list(islice((t for f, n, p in found for t in self._gaps(f, n, p, chance)), count))

    def score(self, tasks: Sequence[Task], answers: Sequence[str]) -> dict[str, float]:
        """Returns the share of answers with which the doctests pass, and of those equal to the original."""
        passed = [_passes(task, answer) for task, answer in zip(tasks, answers, strict=True)]
        equal = [task.expected == answer for task, answer in zip(tasks, answers, strict=True)]
        return {"pass@1": sum(passed) / len(tasks), "exact_match": sum(equal) / len(tasks)}

    def _gap(self, text: str, chance: random.Random) -> tuple[int, int]:
        words = [match.span() for match in _WORD.finditer(text)] if chance.random() < self._word_rate else []
        if words:
            return chance.choice(words)
        start, end = sorted(chance.sample(range(len(text) + 1), 2))
        return start, end

    def _gaps(self, file: Path, function: str, place: tuple[int, int], chance: random.Random) -> Iterator[Task]:
        """Yields at most one task: a word without which the doctests do not pass."""
        text = _read(file)
        if not passes(text, file.stem if file.stem != "__init__" else file.parent.name, function):
            return
        words = tokens_in(text, *place)
        for start, end in chance.sample(words, min(3, len(words))):
            task = Task(self._prompt(text, start, end), text[start:end], (file, function, start, end))
            if not _passes(task, ""):
                yield task
                return

    def _prompt(self, text: str, start: int, end: int) -> list[int]:
        """Returns prefix and suffix, each of at most the same length, in the order of most of the samples."""
        room = (self.config.max_length - 3) * 3 // 8  # a quarter is left for the answer
        before, after = self.tokenizer.encode(text[:start]), self.tokenizer.encode(text[end:])
        return self._arranged(before[-room:], after[:room], self._spm_rate > 0.5)

    def _arranged(self, before: list[int], after: list[int], spm: bool) -> list[int]:
        """Returns what precedes the middle: arXiv:2207.14255, section 3; SPM as in its appendix D."""
        if spm:
            return [self._prefix, self._suffix, *after, self._middle, *before]
        return [self._prefix, *before, self._suffix, *after, self._middle]

    def _files(self) -> list[Path]:
        if self._folder is None:
            return stdlib_sources([name for name in stdlib_modules() if name not in TABLES])
        return sorted(self._folder.rglob("*.py"))

    def _names(self, file: Path) -> set[str]:
        return {file.stem, file.parent.name}

    def _parts(self, text: str) -> Iterator[str]:
        """Yields successive lines with about as many tokens as a sample may have."""
        room = self.config.max_length - 4  # special tokens
        part, length = "", 0
        for line in text.splitlines(keepends=True):
            size = len(self.tokenizer.encode(line))
            if part and length + size > room:
                yield part
                part, length = "", 0
            part, length = part + line, length + size
        if part:
            yield part


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _passes(task: Task, answer: str) -> bool:
    file, function, start, end = task.item
    text = _read(file)
    name = file.stem if file.stem != "__init__" else file.parent.name
    return passes(text[:start] + answer + text[end:], name, function)
