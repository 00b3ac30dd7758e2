"""`PretrainedLM`: any causal or encoder-decoder language model of the transformers library as a LightningModule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lightning_hybrid.models.config import OptimizerConfig, config_of
from lightning_hybrid.models.hub import load_pretrained
from lightning_hybrid.models.labels import IGNORED, labeled_loss
from lightning_hybrid.models.optimizers import optimizer_with_schedule


class PretrainedLM(LightningModule):
    """A language model of the transformers library, trained on the labeled tokens of a batch.

    A batch is a dictionary with `input_ids`, `attention_mask` and `labels`, each of shape ``(B, T)``. For a decoder a
    label is the token of its own position, for an encoder-decoder model the labels are the tokens of the target; -100
    is a position without loss. The loss of a step is the mean over all labeled tokens of the global batch.

    Args:
        path: Local folder of a model, or its name on the Hugging Face hub, from where transformers downloads it once.
        config: Instead of `path`: the configuration of a model with initial weights. `model_type` is the name of its
            architecture in transformers, such as `llama` or `t5`; all other values are those of its configuration.
        optimizer: Optimizer and learning rate.
        build_late: Build the model in `configure_model`. With `config` no process then needs to hold all weights.

    Raises:
        ValueError: If not exactly one of `path` and `config` is given, or transformers is missing.
        FileNotFoundError: If `path` is one of this machine where nothing is.
    """

    model: Any

    def __init__(
        self,
        path: str | None = None,
        config: dict[str, Any] | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5),  # noqa: B008 -- frozen
        build_late: bool = False,
    ) -> None:
        super().__init__()
        if (path is None) == (config is None):
            raise ValueError("`path` or `config` must be given, and not both.")
        self.optimizer_config = config_of(OptimizerConfig, optimizer)
        optimizer = dataclasses.asdict(self.optimizer_config)  # type: ignore[assignment] -- plain values are saved
        self.save_hyperparameters(ignore=["build_late"])
        self.config = _configuration(path, config)
        self._path = path
        if not build_late:
            self._build()

    def configure_model(self) -> None:
        """Builds the model if it does not exist yet."""
        if not hasattr(self, "model"):
            self._build()

    def _build(self) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        kind: Any = AutoModelForSeq2SeqLM if self.config.is_encoder_decoder else AutoModelForCausalLM
        if self._path is None:
            self.model = kind.from_config(self.config)
        else:
            self.model = load_pretrained(
                kind.from_pretrained, self._path, "path", config=self.config, dtype=torch.float32
            )
        self.model.train()  # `from_pretrained` switches dropout off

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits for the labels of a batch, of shape ``(B, T, V)``."""
        if self.config.is_encoder_decoder:
            return self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                decoder_input_ids=self._shifted(batch["labels"]),
                use_cache=False,
            ).logits
        # padding is on the right, where a causal model sees it from positions without labels only
        return self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Returns the mean loss in nats per labeled token, and the number of these tokens as its weight."""
        loss, count = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return {"loss": loss, "weight": count}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Logs the cross entropy in bits per labeled token."""
        loss, count = self._loss(batch)
        self.log("val_bits_per_token", loss / math.log(2), prog_bar=True, sync_dist=True, batch_size=int(count))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns the optimizer and its learning rate schedule."""
        return optimizer_with_schedule(self, self.optimizer_config, int(self.trainer.estimated_stepping_batches))

    @torch.inference_mode()
    def answer(self, prompt: list[int], max_new_tokens: int, end: int, temperature: float = 0.0) -> list[int]:
        """Returns the tokens of an answer to a prompt, without the token `end` that ends it.

        Args:
            prompt: Tokens before the answer, or of the encoder.
            max_new_tokens: Largest number of tokens.
            end: Token that ends the answer.
            temperature: Divides the logits before sampling; 0 takes the likeliest token.
        """
        sampling = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
        tokens = self.model.generate(
            torch.tensor([prompt], device=self.device),
            max_new_tokens=max_new_tokens,
            **sampling,
            eos_token_id=end,
            pad_token_id=end,
        )[0].tolist()
        found = tokens[1 if self.config.is_encoder_decoder else len(prompt) :]
        return found[: found.index(end)] if end in found else found

    def _loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"] if self.config.is_encoder_decoder else batch["labels"][:, 1:]
        return labeled_loss(self(batch), labels)

    def _shifted(self, labels: Tensor) -> Tensor:
        """Returns the inputs of the decoder: its start token, and all labels but the last."""
        start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
        before = labels[:, :-1]
        return torch.cat([start, before.where(before != IGNORED, self.config.pad_token_id)], dim=1)


def _configuration(path: str | None, config: Mapping[str, Any] | None) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError:
        given = "path" if config is None else "config"
        raise ValueError(
            f"`{given}` needs transformers. Install it with `pip install 'lightning-hybrid[hf]'`."
        ) from None
    if path is not None:
        return load_pretrained(AutoConfig.from_pretrained, path, "path")
    values = dict(config or {})
    if "model_type" not in values:
        raise ValueError("`config` must have `model_type`, the name of an architecture in transformers, such as llama.")
    return AutoConfig.for_model(values.pop("model_type"), **values)
