"""`TranslationData`: pairs of texts in two languages, for encoder-decoder models and for decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from lightning_hybrid.data.files import existing_of_package, needs, read_rows
from lightning_hybrid.data.sample_data import SampleConfig, SampleData
from lightning_hybrid.data.samples import Sample, Task, completion

HANDBOOK = "/usr/share/doc/debian-handbook/html"
"""Where Debian's package debian-handbook has its pages, in a folder for each of 26 languages."""
_BLOCKS = ("p", "li", "dt", "td", "th", "h1", "h2", "h3", "h4", "h5")
"""Elements of HTML that are a paragraph, besides `<div class="para">`."""


@dataclass(frozen=True)
class Pair:
    """A text and its translation."""

    source: str
    target: str


class TranslationData(SampleData[Pair]):
    """Pairs of texts.

    A row has the fields `source` and `target`, or a field `translation` with a text for each language, as in datasets
    of the Hugging Face hub. A folder of HTML pages has a folder for each language, with the same files: paragraphs are
    aligned if both pages have the same sequence of elements.

    Args:
        source: Language of the texts: key of `translation`, or name of the folder.
        target: Language of the translations.
        path: File or folder of rows (see `read_rows`), or folder of HTML pages.
        encoder_decoder: True: the source is the input of an encoder, and the target that of a decoder. False: a decoder
            continues a message with the source by an answer with the target, as in a chat.
        samples: How samples are tokenized, divided and batched.
    """

    def __init__(
        self,
        source: str = "en-US",
        target: str = "fr-FR",
        path: str = HANDBOOK,
        encoder_decoder: bool = False,
        samples: SampleConfig = SampleConfig(),  # noqa: B008 -- frozen
    ) -> None:
        super().__init__(samples)
        otherwise = "a file of rows with `source` and `target`"
        self._path = existing_of_package(path, "debian-handbook", HANDBOOK, otherwise)
        self._source, self._target = source, target
        self._encoder_decoder = encoder_decoder

    def items(self) -> list[Pair]:
        """Returns the pairs, each once; texts that are the same in both languages are left out."""
        pages = [self._path / name for name in (self._source, self._target)]
        if all(folder.is_dir() for folder in pages):
            pairs = _aligned(*pages)
        elif self._path.is_dir() and any(self._path.glob("*/*.html")):
            known = sorted(folder.name for folder in self._path.iterdir() if folder.is_dir())
            raise ValueError(
                f"`source` and `target` must be folders of {self._path}: {', '.join(known)}. "
                f"Got {self._source} and {self._target}."
            )
        else:
            pairs = [self._pair(row, number) for number, row in enumerate(read_rows(self._path), 1)]
        return list(dict.fromkeys(pair for pair in pairs if pair.source != pair.target))

    def key(self, item: Pair) -> str:
        """Returns the source."""
        return item.source

    def sample(self, item: Pair) -> Sample:
        """Returns the pair; the translation has the loss."""
        end = self.tokenizer.end
        answer = [*self.tokenizer.encode(item.target), end]
        prompt = self._prompt(item)
        return Sample(prompt, answer) if self._encoder_decoder else completion(prompt, answer)

    def task(self, item: Pair) -> Task:
        """Returns the source, to be translated."""
        return Task(self._prompt(item), item.target)

    def score(self, tasks: Sequence[Task], answers: Sequence[str]) -> dict[str, float]:
        """Returns BLEU and chrF of sacrebleu, 0 to 100."""
        try:
            from sacrebleu import corpus_bleu, corpus_chrf
        except ImportError:
            raise ValueError(f"the scores of translations need sacrebleu. {needs('sacrebleu')}") from None
        expected = [[task.expected for task in tasks]]
        return {"bleu": corpus_bleu(answers, expected).score, "chrf": corpus_chrf(answers, expected).score}

    def _prompt(self, item: Pair) -> list[int]:
        if self._encoder_decoder:
            return [*self.tokenizer.encode(item.source), self.tokenizer.end]
        return self.tokenizer.chat([{"role": "user", "content": item.source}], answer=True)

    def _pair(self, row: Mapping[str, Any], number: int) -> Pair:
        texts, names = (row, ("source", "target"))
        if isinstance(row.get("translation"), Mapping):
            texts, names = (row["translation"], (self._source, self._target))
        if not all(isinstance(texts.get(name), str) for name in names):
            raise ValueError(
                f"row {number}: a pair has the texts `source` and `target`, or `translation` with the texts "
                f"{self._source!r} and {self._target!r}. Got {', '.join(map(str, texts))}."
            )
        return Pair(*(texts[name] for name in names))


class _Paragraphs(HTMLParser):
    """Collects the texts of paragraphs, with the names of their elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._inside: str | None = None
        self._depth, self._text = 0, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begins a paragraph, unless one has begun."""
        if self._inside is None and (tag in _BLOCKS or dict(attrs).get("class") == "para"):
            self._inside, self._depth, self._text = tag, 0, ""
        self._depth += tag == self._inside

    def handle_endtag(self, tag: str) -> None:
        """Ends the paragraph."""
        self._depth -= tag == self._inside
        if tag == self._inside and self._depth == 0:
            self.found.append((tag, " ".join(self._text.split())))
            self._inside = None

    def handle_data(self, data: str) -> None:
        """Adds text to the paragraph."""
        self._text += data


def _aligned(source: Path, target: Path) -> list[Pair]:
    pairs: list[Pair] = []
    for page in sorted(source.glob("*.html")):
        if not (target / page.name).is_file():
            continue
        texts = [_paragraphs(folder / page.name) for folder in (source, target)]
        if [tag for tag, _ in texts[0]] == [tag for tag, _ in texts[1]]:
            pairs += [Pair(one, other) for (_, one), (_, other) in zip(*texts, strict=True) if one and other]
    if not pairs:
        raise ValueError(f"`path`: {source} and {target} have no HTML pages of the same name with the same elements.")
    return pairs


def _paragraphs(page: Path) -> list[tuple[str, str]]:
    parser = _Paragraphs()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.found
