"""Samples for supervised training: tokens and labels, padded batches, and tasks whose answers are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
"""Label of a token without loss, as in `torch.nn.functional.cross_entropy`."""
Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, padded on the right."""


@dataclass(frozen=True)
class Sample:
    """Tokens and labels.

    For a decoder both have the same length; the label of a position is its own token, or `IGNORED` where there is no
    loss. For an encoder-decoder model the labels are the tokens of the target.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def length(self) -> int:
        """Length of the longer sequence."""
        return max(len(self.input_ids), len(self.labels))


def completion(prompt: Sequence[int], answer: Sequence[int]) -> Sample:
    """Returns the sample of a decoder whose loss is that of the `answer`."""
    return Sample([*prompt, *answer], [IGNORED] * len(prompt) + list(answer))


@dataclass(frozen=True)
class Task:
    """A prompt whose answer is scored."""

    prompt: list[int]
    """Input of the model: tokens before the answer, or those of an encoder."""
    expected: str
    """The reference answer."""
    item: Any = None
    """Data for `SampleData.score`."""


class Samples(Dataset[Mapping[str, Tensor]]):
    """A dataset of samples, whose items have the tensors `input_ids` and `labels`."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._ids = [torch.tensor(sample.input_ids, dtype=torch.int32) for sample in samples]
        self._labels = [torch.tensor(sample.labels, dtype=torch.int32) for sample in samples]
        self.lengths = [sample.length for sample in samples]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return {"input_ids": self._ids[index].long(), "labels": self._labels[index].long()}


class Padding:
    """Collate function: pads the samples of a batch to the longest.

    Args:
        pad: Token that fills `input_ids`.
    """

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> Batch:
        """Returns the batch; labels are filled with `IGNORED`."""
        ids = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": _padded(ids, self._pad),
            "attention_mask": _padded([torch.ones_like(one) for one in ids], 0),
            "labels": _padded([sample["labels"] for sample in samples], IGNORED),
        }


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
