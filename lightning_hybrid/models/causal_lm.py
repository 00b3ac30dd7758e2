"""Next-token prediction as a LightningModule. It knows nothing of devices or layouts.

Dims in the suffixes of tensor names: B batch, T time, V vocabulary.
"""

import math

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.models.transformer import Transformer

Batch = tuple[Tensor, Tensor]

_BETAS = (0.9, 0.95)
"""AdamW's decay rates, as LLaMA, section 2.3."""
_FINAL_RATE = 0.1
"""The learning rate ends at this share of its peak, as LLaMA, section 2.3."""


class CausalLM(LightningModule):
    """A small Llama-style transformer that learns to predict the next token.

    Args:
        vocabulary: Number of token values, V; 256 for bytes.
        width: Model width.
        blocks: Number of transformer blocks.
        heads: Number of attention heads in each block.
        context_length: The longest sequence, in tokens.
        learning_rate: Peak learning rate of AdamW.
        warmup_steps: Steps in which the learning rate rises to its peak; then it falls along a half cosine.
        weight_decay: AdamW's weight decay, on matrices only.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        width: int = 128,
        blocks: int = 4,
        heads: int = 4,
        context_length: int = 256,
        learning_rate: float = 3e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.context_length = context_length
        self.transformer = Transformer(vocabulary, width, blocks, heads, context_length)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return ``logits_BTV``, the unnormalised log-probabilities of the token after each position."""
        return self.transformer(tokens_BT)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross entropy, in nats a token, of ``(tokens_BT, targets_BT)``."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))
        return loss

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
        """Return AdamW with a linear warm-up and a half-cosine decay over the whole run."""
        parameters = list(self.parameters())
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=_BETAS,
        )
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_share(step, self.warmup_steps, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
        tokens_BT = prompt_BT
        for _ in range(max_new_tokens):
            logits_BV = self(tokens_BT[:, -self.context_length :])[:, -1]
            if temperature == 0:
                next_B1 = logits_BV.argmax(dim=-1, keepdim=True)
            else:
                probabilities_BV = (logits_BV / temperature).softmax(dim=-1)
                next_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
            tokens_BT = torch.cat([tokens_BT, next_B1], dim=1)
        return tokens_BT

    def _loss(self, batch: Batch) -> Tensor:
        tokens_BT, targets_BT = batch
        return F.cross_entropy(self(tokens_BT).flatten(0, 1), targets_BT.flatten())

    def _log_bits(self, name: str, batch: Batch) -> None:
        bits = self._loss(batch) / math.log(2)
        self.log(name, bits, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))


def learning_rate_share(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step as a share of its peak.

    Args:
        step: Optimizer steps taken so far.
        warmup_steps: Steps of the linear rise; it reaches 1 at the last of them.
        total_steps: Steps of the whole run; the half cosine ends there at a tenth.

    Returns:
        A share between 0 and 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
