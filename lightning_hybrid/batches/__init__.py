"""Counts the samples of batches, splits batches into microbatches, and tells their forms apart."""

from lightning_hybrid.batches.split import (
    Samples,
    agreed_samples,
    copied_batch,
    count_samples,
    count_tokens,
    find_samples,
    joined_batches,
    positions_of,
    samples_of_batch,
    split_batch,
    split_sequences,
    tiled_batch,
)
from lightning_hybrid.batches.values import SCALARS, dense_parts, leaves_of, signature, tensors_in

__all__ = [
    "SCALARS",
    "Samples",
    "agreed_samples",
    "copied_batch",
    "count_samples",
    "count_tokens",
    "dense_parts",
    "find_samples",
    "joined_batches",
    "leaves_of",
    "positions_of",
    "samples_of_batch",
    "signature",
    "split_batch",
    "split_sequences",
    "tensors_in",
    "tiled_batch",
]
