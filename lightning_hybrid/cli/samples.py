"""`recipes show NAME --sample`: the first training samples of a recipe as text, with their loss mask."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest

from lightning_hybrid.cli.errors import UsageError
from lightning_hybrid.cli.training import make_data
from lightning_hybrid.data import IGNORED, SampleData


def show(recipe: str, overrides: Sequence[str], count: int) -> None:
    """Prints the first samples of a recipe.

    Args:
        recipe: Its name or file.
        overrides: Options of `fit` that override it, such as `--data.path=my.jsonl`.
        count: Number of samples.

    Raises:
        UsageError: If the data module cannot be built or has no samples.
    """
    data = make_data(["--config", recipe, "--seed_everything=false", *overrides])
    if not isinstance(data, SampleData):
        raise UsageError(f"`--sample` needs a data module with labels. {recipe} has {type(data).__name__}.")
    samples = data.first_samples(count)
    for number, sample in enumerate(samples):
        # the labels of a decoder are its own tokens; otherwise the sample is one for an encoder and a decoder
        separate = any(label not in (IGNORED, token) for token, label in zip_longest(sample.input_ids, sample.labels))
        loss = sum(label != IGNORED for label in sample.labels)
        sys.stdout.write(f"sample {number}: {len(sample.input_ids)} tokens, {loss} with loss\n")
        if separate:
            _write("", data.tokenizer.decode(sample.input_ids, special=True))
            _write("loss", data.tokenizer.decode(sample.labels, special=True))
            continue
        for kind, tokens in _runs(sample.input_ids, sample.labels):
            _write(kind, data.tokenizer.decode(tokens, special=True))


def _runs(tokens: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    for trained, run in groupby(zip(tokens, labels, strict=True), lambda pair: pair[1] != IGNORED):
        yield "loss" if trained else "", [token for token, _ in run]


def _write(kind: str, text: str) -> None:
    for line in text.split("\n"):
        sys.stdout.write(f"  {kind:4} | {line}\n")
