"""Peak host memory of a rank, beside that of a single process that trains the same model on the same global batch.

The kernel keeps a process's largest resident set (`VmHWM`), and `5` written to `clear_refs` sets it back to the present
one. Each figure comes from fresh processes, which train a tiny model first, so that code and buffers that do not depend
on the model are not counted. The C library is told to give freed memory of every tensor of 64 KiB or more back at once,
so that the figure is what was in use and not what the allocator kept. The model is built in `configure_model`.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_hybrid import HybridStrategy, Layout
from lightning_hybrid.models.causal_lm import CausalLM
from lightning_hybrid.models.transformer import Transformer
from tests.benchmarks.contestants import LEARNING_RATE, SEED, Size, loader
from tests.harness import RankGroup

MEMORY_LAYOUTS = ("fsdp2", "pp2")
STEPS = 3
M_MMAP_THRESHOLD = -3
"""Of `mallopt`, by glibc's malloc.h: blocks of at least so many bytes are mapped alone and unmapped when freed."""
MAPPED_ALONE_BYTES = 64 * 1024
MIB = 2**20
BYTES_PER_WEIGHT = 16
"""In float32 with AdamW: weight, gradient and two moments."""


@dataclass(frozen=True, kw_only=True)
class MemorySize(Size):
    """A model whose weights outweigh everything else."""

    width: int = 512
    blocks: int = 8
    heads: int = 8
    time: int = 64
    batch: int = 4


@dataclass(frozen=True)
class Memory:
    """What training took on one rank."""

    peak_growth_bytes: int
    """Largest resident set minus that before the model was built."""
    weights: int
    """Elements of all weights of the model."""


class BuiltLate(CausalLM):
    """Builds its weights in `configure_model`, so that no rank need ever hold them all."""

    def __init__(self, size: Size) -> None:
        super().__init__(size.transformer, build_late=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """All weights in one group."""
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)


def train_and_measure(layout: str | None, size: MemorySize) -> Memory:
    """Runs on every rank; with no layout, on a single process with Lightning's own strategy."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    tiny = MemorySize(width=32, heads=2, vocabulary=64, blocks=size.blocks, time=8, batch=size.batch)
    growth = peak_growth(lambda: _train(layout, tiny), lambda: _train(layout, size))
    with torch.device("meta"):
        weights = sum(p.numel() for p in Transformer(size.transformer).parameters())
    return Memory(growth, weights)


def peak_growth(first: Callable[[], object], run: Callable[[], object]) -> int:
    """Bytes by which the resident set of this process grows at most in `run`, of memory that is in use.

    Args:
        first: Run before, so that what is imported and allocated once does not count.
        run: What is measured.
    """
    if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_ALONE_BYTES):
        raise RuntimeError("this C library has no `mallopt`, without which freed memory would count")
    first()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _train(layout: str | None, size: MemorySize) -> None:
    L.seed_everything(SEED, verbose=False)
    parsed = Layout.parse(layout) if layout else Layout()
    # The environment counts as one of several processes to Lightning until its teardown has changed it.
    os.environ["WORLD_SIZE"] = str(parsed.devices)
    L.Trainer(
        strategy=HybridStrategy(layout=layout, verify="off") if layout else "auto",
        accelerator="cpu",
        devices=parsed.devices,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(BuiltLate(size), loader(size, STEPS, replicas=parsed.replicas))


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no field {field}")
    return int(match[1]) * 1024


def measure_memory(layouts: Sequence[str], size: MemorySize) -> str:
    """A markdown table of the peak memory of the fullest rank under each layout.

    Args:
        layouts: Which to measure.
        size: Of the model.
    """
    lines = [
        "| layout | peak of the largest rank, MiB | relative to a single process | weights, gradients, moments, MiB |",
        "|---|---|---|---|",
    ]
    single = _fullest(None, size)
    for layout in (None, *layouts):
        memory = single if layout is None else _fullest(layout, size)
        state = memory.weights * BYTES_PER_WEIGHT / (Layout.parse(layout).devices if layout else 1)
        share = memory.peak_growth_bytes / single.peak_growth_bytes
        name = f"`{layout}`" if layout else "single process"
        lines.append(f"| {name} | {memory.peak_growth_bytes / MIB:.0f} | {share:.2f} | {state / MIB:.0f} |")
    return "\n".join(lines)


def _fullest(layout: str | None, size: MemorySize) -> Memory:
    with RankGroup(Layout.parse(layout).devices if layout else 1, timeout_seconds=180) as ranks:
        return max(ranks.call(train_and_measure, layout, size), key=lambda memory: memory.peak_growth_bytes)
