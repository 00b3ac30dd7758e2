"""What one entry of the zoo is: a LightningModule as its user writes it, and the batches it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch.utils.data import Dataset

BATCH_SIZE = 16
"""Samples in one global batch."""
STEPS = 3
VOCABULARY = 160
SEQUENCE = 16
FIRST_TOKEN = 5
"""Smaller token ids are padding and the like, which some models treat specially."""
CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model of the zoo."""

    name: str
    build: Callable[[], L.LightningModule]
    """Makes the module; weights come from the default generator, seeded just before."""
    sample: Callable[[torch.Generator], Any]
    """Makes one sample."""
    microbatches: int | Literal["auto"] = 4
    """Microbatches under pipelining; `"auto"` where the module limits them, as batch statistics do."""
    exact: bool = True
    """Whether the result must equal that of one process; only dropout is random by layout."""
    slow: bool = False
    """Whether the case runs only in the full report."""


class Samples(Dataset):
    """A fixed list of random samples, the same in every process and independent of the default generator."""

    def __init__(self, sample: Callable[[torch.Generator], Any], count: int, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._samples = [sample(generator) for _ in range(count)]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        """The sample at `index`."""
        return self._samples[index]


def token_ids(generator: torch.Generator, length: int = SEQUENCE) -> torch.Tensor:
    """Random token ids, none of them special. Shape: (length,)."""
    return torch.randint(FIRST_TOKEN, VOCABULARY, (length,), generator=generator)


def class_id(generator: torch.Generator) -> torch.Tensor:
    """A random class. Shape: ()."""
    return torch.randint(CLASSES, (), generator=generator)
