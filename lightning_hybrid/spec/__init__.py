"""Layouts, requests, plans and errors, in plain Python without torch."""

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

__all__ = ["Layout", "PartitionError"]
