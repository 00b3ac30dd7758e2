"""`CausalLM`: next-token prediction as a LightningModule, independent of devices and layouts.

Dims in the suffixes of tensor names: B batch, T time, V vocabulary, L layers of experts, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.models.attention import Cache
from lightning_hybrid.models.config import OptimizerConfig, StreamsConfig, TransformerConfig, config_of
from lightning_hybrid.models.experts import Router, max_violation
from lightning_hybrid.models.optimizers import optimizer_with_schedule
from lightning_hybrid.models.transformer import Transformer

Batch = tuple[Tensor, Tensor]


class CausalLM(LightningModule):
    """A transformer trained to predict the next token.

    Args:
        transformer: Configuration: dense, or with latent attention, experts, multi-token prediction.
        optimizer: Optimizer and learning rate.
        streams: Parallel streams (ParScale), opened at the start of this run.
        build_late: Build the weights in `configure_model`, so that no process needs to hold all of them.
        initial_weights: File of `Trainer.save_checkpoint` in a single process (or of `lightning-hybrid consolidate`)
            with the initial weights, such as those of a first phase without streams.
    """

    transformer: Transformer

    def __init__(
        self,
        transformer: TransformerConfig = TransformerConfig(),  # noqa: B008 -- frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 -- frozen
        streams: StreamsConfig | None = None,
        build_late: bool = False,
        initial_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config_of(TransformerConfig, transformer)
        self.optimizer_config = config_of(OptimizerConfig, optimizer)
        opened = None if streams is None else config_of(StreamsConfig, streams)
        # `save_hyperparameters` saves these local variables: plain values for checkpoints and loggers
        transformer, optimizer, streams = (  # type: ignore[assignment]
            value and dataclasses.asdict(value) for value in (self.config, self.optimizer_config, opened)
        )
        self.save_hyperparameters(ignore=["initial_weights", "build_late"])  # a checkpoint contains the weights
        self._streams, self._initial_weights = opened, initial_weights
        if not build_late:
            self._build()
        self._total_steps: float = math.inf
        self._violation: Tensor | None = None
        """MaxVio of the last step, logged in the next one: a log within a step needs no additional collective."""

    def configure_model(self) -> None:
        """Builds the transformer if it does not exist yet."""
        if not hasattr(self, "transformer"):
            self._build()

    def _build(self) -> None:
        self.transformer = Transformer(self.config)
        if self._initial_weights is not None:
            self._load(self._initial_weights)
        if self._streams is not None:
            self.transformer.open_streams(self._streams)

    def open_streams(self, streams: StreamsConfig | int) -> None:
        """Switch from one stream to several, now or when the transformer is built; see `Transformer.open_streams`.

        Args:
            streams: The configuration, or the number of streams.
        """
        opened = StreamsConfig(count=streams) if isinstance(streams, int) else streams
        self.hparams["streams"] = dataclasses.asdict(opened)  # saved in later checkpoints
        self._streams = opened
        if hasattr(self, "transformer"):
            self.transformer.open_streams(opened)

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Return ``logits_BTV``, the unnormalized log-probabilities of the token after each position."""
        return self.transformer(tokens_BT, None, cache)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of ``(tokens_BT, targets_BT)`` in nats per token; log the next-token loss and MaxVio."""
        losses = self.transformer(*batch)
        self.log("train_loss", losses.next_token, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))
        if self._violation is not None:
            self.log("max_violation", self._violation, sync_dist=True, batch_size=len(batch[0]))
        return losses.next_token + self._further_weight() * losses.further_tokens + losses.balance

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the cross entropy in bits per token, which is bits per byte for byte-level data."""
        self._log_bits("val_bits_per_byte", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the cross entropy in bits per token."""
        self._log_bits("test_bits_per_byte", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross entropy of each window in bits per token, of shape ``(B,)``."""
        tokens_BT, targets_BT = batch
        nats_BT = F.cross_entropy(self(tokens_BT).transpose(1, 2), targets_BT, reduction="none")
        return nats_BT.mean(dim=1) / math.log(2)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its learning rate schedule."""
        self._total_steps = total_steps = int(self.trainer.estimated_stepping_batches)
        return optimizer_with_schedule(self, self.optimizer_config, total_steps)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the router biases, before callbacks can save the result of the step."""
        super().optimizer_step(*args, **kwargs)
        routers = [module for module in self.modules() if isinstance(module, Router)]
        if not routers:
            return
        loads_LE = torch.stack([router.load for router in routers])
        if dist.is_available() and dist.is_initialized():
            # over all ranks: a stage of a pipeline counts the loads of its own routers only; ranks of `tp` count the
            # same tokens, which does not change the relative loads
            dist.all_reduce(loads_LE)
        config = routers[0].config
        moving = self.trainer.global_step < config.bias_share * self._total_steps
        for router, load_E in zip(routers, loads_LE, strict=True):
            router.balance(load_E, config.bias_rate if moving else 0.0)
        self._violation = torch.stack([max_violation(load_E) for load_E in loads_LE]).max()

    @torch.inference_mode()
    def generate(
        self,
        prompt_BT: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts by sampling one token after another.

        Args:
            prompt_BT: Tokens to start from, at least one each.
            max_new_tokens: Number of tokens to add.
            temperature: Divides the logits: below 1 favors likely tokens, 0 always takes the likeliest.
            generator: Source of randomness; torch's default one if None.

        Returns:
            Prompts and continuations, of shape ``(B, T + max_new_tokens)``.
        """
        tokens_BT, cache, length = prompt_BT, Cache(), self.config.context_length
        for _ in range(max_new_tokens):
            if cache.length in (0, length):  # a moving window changes all positions, which invalidates the cache
                cache = Cache()
                fed_BT = tokens_BT[:, -length:]
            else:
                fed_BT = tokens_BT[:, -1:]
            next_B1 = next_token(self(fed_BT, cache)[:, -1], temperature, generator)
            tokens_BT = torch.cat([tokens_BT, next_B1], dim=1)
        return tokens_BT

    def _further_weight(self) -> float:
        config = self.config.prediction
        if config is None:
            return 0.0
        later = self.trainer.global_step >= config.later_from * self._total_steps
        return config.later_weight if later else config.weight

    def _loss(self, batch: Batch) -> Tensor:
        tokens_BT, targets_BT = batch
        return F.cross_entropy(self(tokens_BT).flatten(0, 1), targets_BT.flatten())

    def _log_bits(self, name: str, batch: Batch) -> None:
        bits = self._loss(batch) / math.log(2)
        self.log(name, bits, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))

    def _load(self, path: str) -> None:
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state = {k: v for k, v in content["state_dict"].items() if not k.startswith("transformer.further.")}
        expected = {k: v.shape for k, v in self.state_dict().items() if not k.startswith("transformer.further.")}
        different = sorted(expected.items() ^ {k: v.shape for k, v in state.items()}.items())
        if different:
            raise ValueError(
                f"`initial_weights` must fit the transformer. {path!r} differs in {len({k for k, _ in different})} "
                f"tensors, such as {different[0][0]!r}. Give the `transformer` that it was trained with."
            )
        self.load_state_dict(state, strict=False)


def next_token(logits_BV: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Return the likeliest tokens at temperature 0, otherwise a sample, of shape ``(B, 1)``."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits_BV / temperature).softmax(dim=-1), 1, generator=generator)
