"""The same small Llama-style transformer under `HybridStrategy` and as one would parallelize it by hand.

Dims in the suffixes of tensor names: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_hybrid import HybridStrategy, Layout
from lightning_hybrid.models import CausalLM, TransformerConfig
from lightning_hybrid.models.transformer import Block, Transformer
from tests.benchmarks.contest import Clock, Contestant, Training

SEED = 5
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the model and of a batch."""

    vocabulary: int = 1024
    width: int = 256
    blocks: int = 4
    heads: int = 4
    time: int = 128
    """Tokens in a sample, T."""
    batch: int = 8
    """Samples of the global batch."""
    microbatches: int = 4
    """Under `pp`."""

    @property
    def transformer(self) -> TransformerConfig:
        """The model."""
        return TransformerConfig(
            vocabulary=self.vocabulary,
            width=self.width,
            blocks=self.blocks,
            heads=self.heads,
            context_length=self.time,
        )


class Tokens(Dataset):
    """Random windows and the tokens that follow them; any index is valid."""

    _WINDOWS = 64

    def __init__(self, size: Size, samples: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self._tokens = torch.randint(size.vocabulary, (self._WINDOWS, size.time + 1), generator=generator)
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self._tokens[index % self._WINDOWS]
        return window[:-1], window[1:]


class Model(CausalLM):
    """The module as a user has it, with AdamW at a constant learning rate."""

    def __init__(self, size: Size) -> None:
        super().__init__(size.transformer)

    def configure_optimizers(self) -> Any:
        """All weights in one group."""
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)


class ShardedByHand(Model):
    """For `ModelParallelStrategy`: `fully_shard` on each block and on the rest."""

    def configure_model(self) -> None:
        """Called by Lightning on every rank."""
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]  -- Lightning sets it before this hook
        for block in self.transformer.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.transformer, mesh=mesh)


class DividedByHand(Model):
    """For `ModelParallelStrategy`: heads, hidden channels and vocabulary divided over the ranks."""

    def configure_model(self) -> None:
        """Called by Lightning on every rank."""
        mesh = self.device_mesh["tensor_parallel"]  # type: ignore[index]  -- Lightning sets it before this hook
        plan: dict[str, Any] = {
            "embedding": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        for i in range(len(self.transformer.blocks)):
            plan |= {f"blocks.{i}.attention.{name}_proj": ColwiseParallel() for name in "qkv"}
            plan |= {f"blocks.{i}.feed_forward.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
            plan[f"blocks.{i}.attention.out_proj"] = RowwiseParallel()
            plan[f"blocks.{i}.feed_forward.down_proj"] = RowwiseParallel()
        parallelize_module(self.transformer, mesh, plan)


class FirstStage(nn.Module):
    """Embedding and the first half of the blocks."""

    def __init__(self, whole: Transformer, blocks: int) -> None:
        super().__init__()
        self.embedding, self.blocks = whole.embedding, whole.blocks[:blocks]
        self.register_buffer("rotary_cos", whole.rotary_cos)
        self.register_buffer("rotary_sin", whole.rotary_sin)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the hidden states, ``x_BTD``."""
        return _run(self.blocks, self.embedding(tokens_BT), self.rotary_cos, self.rotary_sin)


class LastStage(nn.Module):
    """The other blocks, final norm and head."""

    def __init__(self, whole: Transformer, blocks: int) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = whole.blocks[blocks:], whole.norm, whole.head
        self.register_buffer("rotary_cos", whole.rotary_cos)
        self.register_buffer("rotary_sin", whole.rotary_sin)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the logits, ``logits_BTV``."""
        return self.head(self.norm(_run(self.blocks, x_BTD, self.rotary_cos, self.rotary_sin)))


def _run(blocks: Any, x_BTD: Tensor, cos_TK: Any, sin_TK: Any) -> Tensor:
    time = x_BTD.shape[1]
    block: Block
    for block in blocks:
        x_BTD, _ = block(x_BTD, cos_TK[:time], sin_TK[:time])
    return x_BTD


def pipelined_by_hand(contestant: Contestant, size: Size) -> None:
    """A plain training loop over two hand-written stages with torch's 1F1B."""
    L.seed_everything(SEED, verbose=False)
    rank, half = dist.get_rank(), size.blocks // 2
    whole = Model(size).transformer
    module = FirstStage(whole, half) if rank == 0 else LastStage(whole, half)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))

    def loss_of(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    schedule = Schedule1F1B(stage, n_microbatches=size.microbatches, loss_fn=loss_of)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)
    for tokens_BT, targets_BT in loader(size, contestant.total_steps, replicas=1):
        contestant.step_starts()
        losses: list[Tensor] = []
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(tokens_BT)
        else:
            schedule.step(target=targets_BT, losses=losses, return_outputs=False)
        optimizer.step()
        if losses:
            contestant.losses.append(torch.stack(losses).mean().detach())
        contestant.step_ends()


def loader(size: Size, steps: int, *, replicas: int) -> DataLoader:
    """The batches of this rank's replica, in the same order for all contestants."""
    data = Tokens(size, steps * size.batch)
    # Lightning's strategies would shuffle, each with its own seed; a loader with a distributed sampler is left alone.
    rank = int(os.environ.get("RANK", "0")) if replicas > 1 else 0
    order = DistributedSampler(data, replicas, rank, shuffle=False)
    return DataLoader(data, batch_size=size.batch // replicas, sampler=order)


def fit(
    module: L.LightningModule,
    strategy: Any,
    callbacks: L.Callback | list[L.Callback],
    size: Size,
    *,
    steps: int,
    replicas: int,
    **trainer: Any,
) -> None:
    """Trains with Lightning, on every rank."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"accelerator": "cpu", "devices": int(os.environ["WORLD_SIZE"])} | trainer
    L.Trainer(
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, loader(size, steps, replicas=replicas))


def ours(layout: str, size: Size) -> Training:
    """The unmodified module under `HybridStrategy`."""

    def training(contestant: Contestant) -> None:
        L.seed_everything(SEED, verbose=False)
        strategy = HybridStrategy(layout=layout, microbatches=size.microbatches if "pp" in layout else "auto")
        steps = contestant.total_steps
        fit(Model(size), strategy, Clock(contestant), size, steps=steps, replicas=_replicas(layout))

    return training


def by_hand(layout: str, size: Size) -> Training:
    """What a user writes for the same layout without this package."""

    def training(contestant: Contestant) -> None:
        L.seed_everything(SEED, verbose=False)
        clock, steps = Clock(contestant), contestant.total_steps
        if layout == "dp2":
            fit(Model(size), DDPStrategy(), clock, size, steps=steps, replicas=2)
        elif layout == "fsdp2":
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            fit(ShardedByHand(size), strategy, clock, size, steps=steps, replicas=2)
        elif layout == "tp2":
            strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
            fit(DividedByHand(size), strategy, clock, size, steps=steps, replicas=1)
        elif layout == "pp2":
            pipelined_by_hand(contestant, size)
        else:
            raise ValueError(f"`layout` must be one of dp2, fsdp2, tp2, pp2. Got {layout!r}.")

    return training


def _replicas(layout: str) -> int:
    parsed = Layout.parse(layout)
    return parsed.replicas
