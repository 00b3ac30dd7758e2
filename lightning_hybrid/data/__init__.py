"""Data modules for text in local files, and a batch sampler with a token budget."""

from lightning_hybrid.data.chat import ChatData
from lightning_hybrid.data.code import CodeData
from lightning_hybrid.data.files import read_rows
from lightning_hybrid.data.reasoning import ReasoningData
from lightning_hybrid.data.sample_data import SampleConfig, SampleData
from lightning_hybrid.data.samples import IGNORED, Sample, Task
from lightning_hybrid.data.stdlib import StdlibText
from lightning_hybrid.data.styles import StyledText
from lightning_hybrid.data.text import BYTE_VOCABULARY, ByteWindows, read_bytes, stdlib_modules, stdlib_sources
from lightning_hybrid.data.token_batches import TokenBatch, TokenBatchSampler
from lightning_hybrid.data.tokenizers import ByteTokenizer, PretrainedTokenizer
from lightning_hybrid.data.translation import TranslationData

__all__ = [
    "BYTE_VOCABULARY",
    "IGNORED",
    "ByteTokenizer",
    "ByteWindows",
    "ChatData",
    "CodeData",
    "PretrainedTokenizer",
    "ReasoningData",
    "Sample",
    "SampleConfig",
    "SampleData",
    "StdlibText",
    "StyledText",
    "Task",
    "TokenBatch",
    "TokenBatchSampler",
    "TranslationData",
    "read_bytes",
    "read_rows",
    "stdlib_modules",
    "stdlib_sources",
]
