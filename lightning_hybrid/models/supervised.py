"""`SupervisedLM`: a `CausalLM` for samples with labels, such as conversations or prompts with answers.

Dims in the suffixes of tensor names: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.models.attention import Cache
from lightning_hybrid.models.causal_lm import CausalLM, next_token
from lightning_hybrid.models.config import OptimizerConfig, StreamsConfig, TransformerConfig
from lightning_hybrid.models.labels import IGNORED, labeled_loss


class SupervisedLM(CausalLM):
    """A transformer trained on the labeled tokens of a batch.

    A batch is a dictionary with `input_ids` and `labels`, each of shape ``(B, T)``; a label is the token of its own
    position, or -100 for no loss. The loss of a step is the mean over all labeled tokens of the global batch.

    Args:
        transformer: Configuration, without multi-token prediction and without the balance loss of experts.
        optimizer: Optimizer and learning rate.
        streams: Parallel streams (ParScale).
        build_late: Build the weights in `configure_model`, so that no process needs to hold all of them.
        initial_weights: File with the initial weights, as written by `lightning-hybrid consolidate`.

    Raises:
        ValueError: If the loss would have parts that are no means over tokens.
    """

    def __init__(
        self,
        transformer: TransformerConfig = TransformerConfig(),  # noqa: B008 -- frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 -- frozen
        streams: StreamsConfig | None = None,
        build_late: bool = False,
        initial_weights: str | None = None,
    ) -> None:
        super().__init__(transformer, optimizer, streams, build_late, initial_weights)
        if self.config.prediction is not None:
            raise ValueError("`prediction` cannot be combined with labels of samples. Leave it out.")
        if self.config.experts is not None and self.config.experts.balance_loss:
            raise ValueError(
                "`balance_loss` is a mean over samples, but the loss of labels is one over tokens. Set it to 0: "
                "the biases of the router balance the experts."
            )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override] -- other batches
        """Returns the mean loss in nats per labeled token, and the number of these tokens as its weight."""
        loss, count = self._labeled_loss(batch)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return {"loss": loss, "weight": count}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:  # type: ignore[override] -- other batches
        """Logs the cross entropy in bits per labeled token."""
        self._log_labeled_bits("val_bits_per_token", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:  # type: ignore[override] -- other batches
        """Logs the cross entropy in bits per labeled token."""
        self._log_labeled_bits("test_bits_per_token", batch)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override] -- other batches
        """Returns the cross entropy of each sample in bits per labeled token, of shape ``(B,)``."""
        targets_BT = batch["labels"][:, 1:]
        logits_BTV = self(batch["input_ids"][:, :-1])
        nats_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none", ignore_index=IGNORED)
        return nats_BT.sum(dim=1) / (targets_BT != IGNORED).sum(dim=1) / math.log(2)

    @torch.inference_mode()
    def answer(self, prompt: list[int], max_new_tokens: int, end: int, temperature: float = 0.0) -> list[int]:
        """Continues a prompt up to the token `end` or a full context.

        Args:
            prompt: Tokens to start from.
            max_new_tokens: Largest number of tokens to add.
            end: Token that ends the answer.
            temperature: Divides the logits before sampling; 0 takes the likeliest token.

        Returns:
            The tokens that are added, without `end`.
        """
        cache, found = Cache(), []
        fed_BT = torch.tensor([prompt], device=self.device)
        for _ in range(min(max_new_tokens, self.config.context_length - len(prompt))):
            fed_BT = next_token(self(fed_BT, cache)[:, -1], temperature)
            if fed_BT.item() == end:
                break
            found.append(int(fed_BT))
        return found

    def _labeled_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return labeled_loss(self(batch["input_ids"][:, :-1]), batch["labels"][:, 1:])

    def _log_labeled_bits(self, name: str, batch: Mapping[str, Tensor]) -> None:
        loss, count = self._labeled_loss(batch)
        self.log(name, loss / math.log(2), prog_bar=True, sync_dist=True, batch_size=int(count))
