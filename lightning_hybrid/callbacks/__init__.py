"""Callbacks: thin, they watch a run and show what they see."""

from lightning_hybrid.callbacks.sample import GenerateSample
from lightning_hybrid.callbacks.throughput import ThroughputMonitor

__all__ = ["GenerateSample", "ThroughputMonitor"]
