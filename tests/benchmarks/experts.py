"""A step with a mixture of experts beside one of a dense model with as many active weights, in one process.

`python -m tests.benchmarks.experts --rounds 30`
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import torch

from lightning_hybrid.models import ExpertsConfig, Transformer, TransformerConfig

WIDTHS = (64, 128, 256)
TIME, TOKENS = 128, 2048
EXPERTS, CHOSEN, SHARED = 16, 3, 1


@dataclass(frozen=True)
class Row:
    """Medians for one width."""

    width: int
    dense_seconds: float
    experts_seconds: float
    ratio: float
    """Median over rounds of the ratio of two steps, one right after the other."""


class _Trained:
    def __init__(self, config: TransformerConfig) -> None:
        torch.manual_seed(0)
        self.module = Transformer(config)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)

    def step(self, text_BT: torch.Tensor) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        losses = self.module(text_BT[:, :-1], text_BT[:, 1:])
        (losses.next_token + losses.balance).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def measure(width: int, rounds: int) -> Row:
    """Steps of both by turns; who begins changes every round."""
    hidden = width * 11 // 16 // 8 * 8
    dense = TransformerConfig(width=width, feed_forward=hidden * (CHOSEN + SHARED), context_length=TIME)
    mixture = ExpertsConfig(experts=EXPERTS, chosen=CHOSEN, hidden=hidden, shared=SHARED)
    models = [_Trained(dense), _Trained(replace(dense, experts=mixture))]
    text_BT = torch.randint(256, (TOKENS // TIME, TIME + 1), generator=torch.Generator().manual_seed(0))
    times: list[list[float]] = [[], []]
    for r in range(rounds + 3):
        for i in (0, 1) if r % 2 else (1, 0):
            seconds = models[i].step(text_BT)
            if r >= 3:  # the first make the optimizer's state
                times[i].append(seconds)
    ratios = [e / d for d, e in zip(*times, strict=True)]
    return Row(width, statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios))


def table(rows: list[Row]) -> str:
    """A line for each width."""
    lines = ["| width | dense, ms per step | experts, ms per step | ratio, median |", "|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r.width} | {r.dense_seconds * 1e3:.1f} | {r.experts_seconds * 1e3:.1f} | {r.ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    torch.set_num_threads(1)
    print(table([measure(width, parser.parse_args().rounds) for width in WIDTHS]))


if __name__ == "__main__":
    main()
