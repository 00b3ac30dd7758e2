"""Text from local files, as Lightning data modules."""

from lightning_hybrid.data.stdlib import StdlibText
from lightning_hybrid.data.text import BYTE_VOCABULARY, ByteWindows, read_bytes, stdlib_modules, stdlib_sources

__all__ = ["BYTE_VOCABULARY", "ByteWindows", "StdlibText", "read_bytes", "stdlib_modules", "stdlib_sources"]
