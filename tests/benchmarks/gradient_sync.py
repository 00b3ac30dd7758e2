"""What replicas that step by themselves lose, and what they save: DiLoCo beside exact gradients, in one run.

    python -m tests.benchmarks.gradient_sync --steps 2000 --exact-steps 540

The quickstart's text and a smaller model; the loss is that of validation, in bits per byte. All ways begin with exact
steps: Douillard et al., arXiv:2311.08105, section 3, take 24,000 of 88,000 before the replicas step by themselves.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import lightning.pytorch as L
import torch

from lightning_hybrid import HybridStrategy
from lightning_hybrid.callbacks import Phase, PhaseSchedule
from lightning_hybrid.data import StdlibText
from lightning_hybrid.models import CausalLM
from lightning_hybrid.models.config import OptimizerConfig, TransformerConfig
from lightning_hybrid.spec.gradient_sync import GradientSync
from tests.benchmarks.overhead import versions
from tests.harness import RankGroup

WAYS = {
    "exact": GradientSync(),
    "bf16": GradientSync(kind="bf16"),
    "bf16_fp32acc": GradientSync(kind="bf16_fp32acc"),
    "diloco": GradientSync(kind="diloco"),
    "diloco, momentum 0.9": GradientSync(kind="diloco", outer_momentum=0.9),
    "local SGD": GradientSync(kind="diloco", outer_learning_rate=1.0, outer_momentum=0.0),
}


def train(sync: GradientSync, steps: int, exact_steps: int) -> tuple[float, float]:
    """Bits a byte at the end, and bytes that a rank sends for each step after the exact ones; on every rank."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    strategy = HybridStrategy(layout="dp4", gradient_sync="exact" if exact_steps else sync)
    phases = [Phase(), Phase(at_step=exact_steps, gradient_sync=sync)]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=4,
        strategy=strategy,
        callbacks=[PhaseSchedule(phases)] if exact_steps else [],
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    config = TransformerConfig(width=64, blocks=2, heads=4, context_length=64)
    module: Any = CausalLM(config, OptimizerConfig(learning_rate=3e-3, warmup_steps=20))
    data = StdlibText(batch_size=32, context_length=64)
    trainer.fit(module, datamodule=data)
    with strategy.engine.divided():
        sent = strategy.engine.runner.gradients.sent_bytes
    trainer.limit_val_batches = 1.0
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    return found["val_bits_per_byte"], sent


def main() -> None:
    """Runs them and prints the table."""
    parser = argparse.ArgumentParser(description="DiLoCo beside exact gradients.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--exact-steps", type=int, default=540)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    print(f"{versions()}\n")
    print("| method | bits per byte | relative to exact | KiB per step and rank | relative to exact |")
    print("|---|---|---|---|---|")
    first: tuple[float, float] | None = None
    with RankGroup(4, timeout_seconds=900) as ranks:
        for name in arguments.ways:
            loss, sent = ranks.call(train, WAYS[name], arguments.steps, arguments.exact_steps)[0]
            first = first or (loss, sent)
            print(
                f"| {name} | {loss:.4f} | {loss / first[0]:.4f} | {sent / 1024:.1f} | {sent / first[1]:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
