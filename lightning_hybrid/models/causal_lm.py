"""Next-token prediction as a LightningModule. It knows nothing of devices or layouts.

Dims in the suffixes of tensor names: B batch, T time, V vocabulary, L layers of experts, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.models.attention import Cache
from lightning_hybrid.models.config import OptimizerConfig, StreamsConfig, TransformerConfig, config_of
from lightning_hybrid.models.experts import Router, max_violation
from lightning_hybrid.models.optimizers import learning_rate_share, make_optimizer
from lightning_hybrid.models.transformer import Transformer

Batch = tuple[Tensor, Tensor]


class CausalLM(LightningModule):
    """A transformer that learns to predict the next token.

    Args:
        transformer: What it is made of: dense, or with latent attention, experts, prediction of further tokens.
        optimizer: The optimizer and its learning rate.
        streams: Parallel streams, opened from the start of this run.
        build_late: Build the weights in `configure_model`, so that no process need hold them all.
        initial_weights: A file of `Trainer.save_checkpoint` (of one process; `lightning-hybrid consolidate` makes it
            from a sharded one) whose weights to start from, such as those of a first phase without streams.
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
        # Lightning saves these variables: as plain values, which a checkpoint and a logger can write
        transformer, optimizer, streams = (  # type: ignore[assignment]
            value and dataclasses.asdict(value) for value in (self.config, self.optimizer_config, opened)
        )
        self.save_hyperparameters(ignore=["initial_weights", "build_late"])  # the checkpoint has weights itself
        self._streams, self._initial_weights = opened, initial_weights
        if not build_late:
            self._build()
        self._total_steps: float = math.inf
        self._violation: Tensor | None = None
        """MaxVio of the last step, logged with the next one: a log in a step costs no collective of its own."""

    def configure_model(self) -> None:
        """Build the transformer, unless it is there."""
        if not hasattr(self, "transformer"):
            self._build()

    def _build(self) -> None:
        self.transformer = Transformer(self.config)
        if self._initial_weights is not None:
            self._load(self._initial_weights)
        if self._streams is not None:
            self.transformer.open_streams(self._streams)

    def open_streams(self, streams: StreamsConfig | int) -> None:
        """Switch from one stream to several, now or once the transformer is built; see `Transformer.open_streams`.

        Args:
            streams: How they are, or only how many.
        """
        opened = StreamsConfig(count=streams) if isinstance(streams, int) else streams
        self.hparams["streams"] = dataclasses.asdict(opened)  # of checkpoints from now on
        self._streams = opened
        if hasattr(self, "transformer"):
            self.transformer.open_streams(opened)

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Return ``logits_BTV``, the unnormalised log-probabilities of the token after each position."""
        return self.transformer(tokens_BT, None, cache)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of ``(tokens_BT, targets_BT)`` in nats a token; log the next token's part and MaxVio."""
        losses = self.transformer(*batch)
        self.log("train_loss", losses.next_token, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))
        if self._violation is not None:
            self.log("max_violation", self._violation, sync_dist=True, batch_size=len(batch[0]))
        return losses.next_token + self._further_weight() * losses.further_tokens + losses.balance

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the cross entropy in bits a token; a token is a byte unless the data says otherwise."""
        self._log_bits("val_bits_per_byte", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the cross entropy in bits a token."""
        self._log_bits("test_bits_per_byte", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return how many bits each window's tokens cost, per token, of shape ``(B,)``."""
        tokens_BT, targets_BT = batch
        nats_BT = F.cross_entropy(self(tokens_BT).transpose(1, 2), targets_BT, reduction="none")
        return nats_BT.mean(dim=1) / math.log(2)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its learning rate over the whole run."""
        optimizer = make_optimizer(self, self.optimizer_config)
        self._total_steps = total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_share(step, self.optimizer_config, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """After the step, move the routers' biases; before callbacks save what the step has made."""
        super().optimizer_step(*args, **kwargs)
        routers = [module for module in self.modules() if isinstance(module, Router)]
        if not routers:
            return
        loads_LE = torch.stack([router.load for router in routers])
        # what several ranks compute together (`tp`) counts on each of them, which changes no expert's share
        loads_LE = torch.as_tensor(self.all_gather(loads_LE)).view(-1, *loads_LE.shape).sum(dim=0)
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
            temperature: Divides the logits: below 1 favours likely tokens, 0 always takes the likeliest.
            generator: Source of randomness; torch's default one if None.

        Returns:
            Prompts and continuations, of shape ``(B, T + max_new_tokens)``.
        """
        tokens_BT, cache, length = prompt_BT, Cache(), self.config.context_length
        for _ in range(max_new_tokens):
            if cache.length in (0, length):  # a window that moves on has other positions: nothing can be kept
                cache = Cache()
                fed_BT = tokens_BT[:, -length:]
            else:
                fed_BT = tokens_BT[:, -1:]
            logits_BV = self(fed_BT, cache)[:, -1]
            if temperature == 0:
                next_B1 = logits_BV.argmax(dim=-1, keepdim=True)
            else:
                probabilities_BV = (logits_BV / temperature).softmax(dim=-1)
                next_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
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
