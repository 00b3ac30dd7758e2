"""`HybridStrategy` on one device beside Lightning's `SingleDeviceStrategy`: step time, loss, TFLOP/s and MFU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_hybrid import HybridStrategy
from lightning_hybrid.models.transformer import Transformer
from tests.benchmarks.contest import Clock, Contestant, Result, Training, compete
from tests.benchmarks.contestants import SEED, Model, Size, fit

PEAK_BF16_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
}
"""Dense bf16 on tensor cores, by `torch.cuda.get_device_name()`. NVIDIA's datasheets of H200, H100 and A100; the first
two state twice as much, with sparsity."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What both contestants do."""

    device: str
    """`"cuda"` or `"cpu"`."""
    size: Size
    precision: Any = "bf16-true"
    compile: bool = False
    """Compile each block."""


HALF_BILLION = Size(vocabulary=32_000, width=1536, blocks=16, heads=12, time=1024, batch=8)
"""0.55 billion weights, of which 0.05 billion only look up embeddings."""


@dataclass(frozen=True)
class Speed:
    """A result with the speeds that it means."""

    result: Result
    flops_per_step: float
    peak_flops: float | None
    """Of the device; None where the table does not have it."""

    def report(self) -> str:
        """Times, TFLOP/s and MFU of both, in one line."""
        parts = [f"ratio {self.result.ratio:.3f} ({self.result.quartiles[0]:.3f} to {self.result.quartiles[1]:.3f})"]
        for name, blocks in (("hybrid", self.result.ours), ("single device", self.result.reference)):
            seconds = self.result.step_seconds(blocks)
            rate = self.flops_per_step / seconds
            mfu = f"MFU {rate / self.peak_flops:.1%}" if self.peak_flops else "MFU unknown: no peak for this device"
            parts.append(f"{name} {seconds * 1e3:.1f} ms, {rate / 1e12:.2f} TFLOP/s, {mfu}")
        return "; ".join(parts)


def compare(setup: Setup, rounds: int, steps: int) -> Speed:
    """Runs both, in a process that is the only one of its group.

    Args:
        setup: What to train, and where.
        rounds: Pairs of blocks that count.
        steps: Training steps in a block.
    """
    result = compete(_training(setup, hybrid=True), _training(setup, hybrid=False), rounds=rounds, steps=steps)
    peak = PEAK_BF16_FLOPS.get(torch.cuda.get_device_name()) if setup.device == "cuda" else None
    return Speed(result, flops_per_step(setup.size), peak)


def flops_per_step(size: Size) -> float:
    """FLOPs of the model, recomputation not counted: (6 N + 12 L D T) a token, N without the embedding's look-up.

    Reference: Chowdhery et al., PaLM, arXiv:2204.02311, appendix B (our L, D, T = their L, H Q, T). As there, causal
    attention counts in full.
    """
    with torch.device("meta"):
        model = Transformer(size.transformer)
    weights = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    return (6 * weights + 12 * size.blocks * size.width * size.time) * size.batch * size.time


def _training(setup: Setup, *, hybrid: bool) -> Training:
    def training(contestant: Contestant) -> None:
        L.seed_everything(SEED, verbose=False)
        module = Model(setup.size)
        if hybrid:
            strategy: Any = HybridStrategy(layout="dp1", compile=setup.compile)
        else:
            strategy = SingleDeviceStrategy(torch.device(setup.device, 0) if setup.device == "cuda" else setup.device)
            for block in module.transformer.blocks if setup.compile else ():
                block.compile()
        options = {"accelerator": setup.device, "devices": 1, "precision": setup.precision}
        fit(module, strategy, Clock(contestant), setup.size, steps=contestant.total_steps, replicas=1, **options)

    return training
