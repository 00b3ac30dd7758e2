"""What is asked of a run and what it asks back: layouts and errors, in plain Python without torch."""

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

__all__ = ["Layout", "PartitionError"]
