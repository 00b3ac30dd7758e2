"""`TokenBatchSampler`: batches with a token budget, of many short or few long samples."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class TokenBatch(list[int]):
    """Sample indices of a batch with their lengths, by which `HybridStrategy` weights gradients."""

    def __init__(self, indices: Sequence[int], lengths: Sequence[int]) -> None:
        super().__init__(indices)
        self.lengths = lengths
        """Tokens of each sample."""


class TokenBatchSampler(Sampler[TokenBatch]):
    """Batches of samples of similar length with at most `max_tokens` tokens, padding included.

    Samples with a length of at most L, and above the next lower bound, form a bucket. A batch of the bucket has
    floor(max_tokens / L) samples. Samples that do not fill the last batch of a bucket move to the next bucket.

    Under `HybridStrategy` the gradient of a step is that of the mean over all its tokens, over replicas, accumulated
    batches and microbatches, if `training_step` returns the mean over the tokens of its batch.

    Args:
        lengths: Tokens of each sample of the dataset, as counted by the mean of the loss.
        max_tokens: Tokens of a batch of one replica. `AdaptiveBatchSize(memory=...)` finds the largest that fits.
        bounds: Upper bounds of the buckets, ascending. None: 1, 1.5, 2, 3, 4, 6 ... times the shortest sample.
        multiple_of: Divisor of the number of samples of a batch, such as the microbatches of a pipeline.
        shuffle: True: shuffle samples within buckets, and the batches, every epoch.
        generator: Generator of the shuffling; None: torch's default generator.
        drop_last: True: drop an incomplete batch of the last bucket.

    Raises:
        ValueError: If an argument is not one of its possible values, or a sample is longer than `max_tokens`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        bounds: Sequence[int] | None = None,
        multiple_of: int = 1,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> None:
        if not len(lengths) or min(lengths) < 1:
            raise ValueError("`lengths` must be at least 1, for at least one sample.")
        if multiple_of < 1:
            raise ValueError(f"`multiple_of` must be at least 1. Got {multiple_of}.")
        self.lengths, self.multiple_of, self.shuffle = list(lengths), multiple_of, shuffle
        self.generator, self.drop_last = generator, drop_last
        self.bounds = list(bounds) if bounds is not None else _bounds(min(lengths), max(lengths))
        if self.bounds != sorted(set(self.bounds)) or self.bounds[-1] < max(lengths):
            raise ValueError(
                f"`bounds` must ascend up to the longest sample, of {max(lengths)} tokens. Got {self.bounds}."
            )
        self._buckets: list[list[int]] = [[] for _ in self.bounds]
        for index, length in enumerate(self.lengths):
            self._buckets[bisect.bisect_left(self.bounds, length)].append(index)
        self.max_tokens = max_tokens

    @property
    def max_tokens(self) -> int:
        """Token budget of a batch; can be set between two epochs."""
        return self._max_tokens

    @max_tokens.setter
    def max_tokens(self, value: int) -> None:
        if value < self.multiple_of * max(self.lengths):
            times = f"{self.multiple_of} times " if self.multiple_of > 1 else ""
            raise ValueError(
                f"`max_tokens` must be at least {times}the longest sample, of {max(self.lengths)} tokens. Got {value}."
            )
        self._max_tokens = value

    def batch_size(self, bound: int) -> int:
        """Returns the number of samples of a batch whose longest sample has `bound` tokens."""
        size = self.max_tokens // min(bound, max(self.lengths))
        return max(size - size % self.multiple_of, self.multiple_of)

    def extremes(self) -> tuple[int, int]:
        """Returns the indices of a longest and of a shortest sample."""
        return self.lengths.index(max(self.lengths)), self.lengths.index(min(self.lengths))

    def __len__(self) -> int:
        count = left = 0
        for bound, bucket in zip(self.bounds, self._buckets, strict=True):
            full, left = divmod(left + len(bucket), self.batch_size(bound))
            count += full
        return count + (left > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[TokenBatch]:
        generator = self.generator
        if generator is None and self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        batches: list[list[int]] = []
        left: list[int] = []
        for bound, bucket in zip(self.bounds, self._buckets, strict=True):
            order = torch.randperm(len(bucket), generator=generator).tolist() if self.shuffle else range(len(bucket))
            # remaining shorter samples first, so that none is deferred to the last bucket
            waiting, size = left + [bucket[i] for i in order], self.batch_size(bound)
            whole = len(waiting) - len(waiting) % size
            batches += [waiting[i : i + size] for i in range(0, whole, size)]
            left = waiting[whole:]
        if left and not self.drop_last:
            batches.append(left)
        numbers = torch.randperm(len(batches), generator=generator).tolist() if self.shuffle else range(len(batches))
        for number in numbers:
            yield TokenBatch(batches[number], [self.lengths[i] for i in batches[number]])


def _bounds(shortest: int, longest: int) -> list[int]:
    bounds, low = [], shortest
    while not bounds or bounds[-1] < longest:
        bounds += [low, low + low // 2] if low > 1 else [low]
        low *= 2
    cut = bisect.bisect_left(bounds, longest)
    return [*bounds[:cut], longest]
