"""Data modules for text in local files, and a batch sampler with a token budget."""

from lightning_hybrid.data.stdlib import StdlibText
from lightning_hybrid.data.text import BYTE_VOCABULARY, ByteWindows, read_bytes, stdlib_modules, stdlib_sources
from lightning_hybrid.data.token_batches import TokenBatch, TokenBatchSampler

__all__ = [
    "BYTE_VOCABULARY",
    "ByteWindows",
    "StdlibText",
    "TokenBatch",
    "TokenBatchSampler",
    "read_bytes",
    "stdlib_modules",
    "stdlib_sources",
]
