"""`StyledText`: texts of several styles, each with the name of its style before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from lightning_hybrid.data.files import existing_of_package, read_rows
from lightning_hybrid.data.sample_data import SampleConfig, SampleData
from lightning_hybrid.data.samples import Sample, Task, completion

FORTUNES = "/usr/share/games/fortunes"
"""Where Debian's package fortunes has its texts, a file for each subject, separated by lines with `%`."""


@dataclass(frozen=True)
class Styled:
    """A text of a style."""

    style: str
    text: str


class StyledText(SampleData[Styled]):
    """Texts for generation in a style that the prompt names.

    A sample is ``[style]``, a line break, and a text, which has the loss. The style of a text is the field `style` of
    its row. For files of text it is the folder in `path` that has the file, or the name of the file in `path` itself.

    Args:
        path: File or folder of rows with `style` and `text`, or of text files (see `read_rows`).
        separator: What separates the texts of a file.
        styles: Styles to use; None: all.
        samples: How samples are tokenized, divided and batched.
    """

    def __init__(
        self,
        path: str = FORTUNES,
        separator: str = "\n%\n",
        styles: Sequence[str] | None = None,
        samples: SampleConfig = SampleConfig(),  # noqa: B008 -- frozen
    ) -> None:
        super().__init__(samples)
        self._path = existing_of_package(path, "fortunes", FORTUNES, "a folder of text files")
        self._separator = separator
        self._styles = None if styles is None else frozenset(styles)

    def items(self) -> list[Styled]:
        """Returns the texts, each once."""
        found: dict[Styled, None] = {}
        for row in read_rows(self._path):
            style = row.get("style") or _style(row.get("file", self._path.name))
            for text in str(row.get("text", "")).split(self._separator):
                if text.strip():
                    found[Styled(style, text.strip())] = None
        known = sorted({item.style for item in found})
        if self._styles is not None and not self._styles <= set(known):
            unknown = sorted(self._styles - set(known))
            raise ValueError(f"`styles` must be among {', '.join(known)}. Got {', '.join(unknown)}.")
        return [item for item in found if self._styles is None or item.style in self._styles]

    def key(self, item: Styled) -> str:
        """Returns the text."""
        return item.text

    def sample(self, item: Styled) -> Sample:
        """Returns the style without loss, and the text with loss."""
        return completion(self._header(item), [*self.tokenizer.encode(item.text), self.tokenizer.end])

    def task(self, item: Styled) -> Task:
        """Returns the style and the first line of a held-out text."""
        first, _, rest = item.text.partition("\n")
        return Task([*self._header(item), *self.tokenizer.encode(first)], rest)

    def score(self, tasks: Sequence[Task], answers: Sequence[str]) -> dict[str, float]:
        """Returns nothing: the texts are printed as examples, and the validation loss is the measure."""
        return {}

    def _header(self, item: Styled) -> list[int]:
        return self.tokenizer.encode(f"[{item.style}]\n")


def _style(file: str) -> str:
    path = PurePath(file)
    return path.parts[0] if len(path.parts) > 1 else path.stem
