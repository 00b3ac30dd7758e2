"""What the transformers cases have in common: the LightningModule around the model, batches, and small sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning.pytorch as L
import torch
import transformers as hf

from tests.zoo.case import SEQUENCE, VOCABULARY, Case, class_id, token_ids

LEARNING_RATE = 1.0
"""Large, so that updates are well above the spacing of float32 numbers near 1, where normalization weights are."""
IMAGE_LEARNING_RATE = 0.1


class HFModule(L.LightningModule):
    """A transformers model as most people train one: the model returns its own loss.

    Args:
        model_class: Name of the class in `transformers`.
        config: Its configuration.
        learning_rate: Of plain SGD.
    """

    def __init__(self, model_class: str, config: hf.PreTrainedConfig, learning_rate: float = LEARNING_RATE) -> None:
        super().__init__()
        self.net = getattr(hf, model_class)(config)
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The model's loss."""
        loss = self.net(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Log the model's loss."""
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, whose update is the gradient."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class LazyHFModule(HFModule):
    """The same, built in `configure_model`: the way to models that are too large for one process."""

    def __init__(self, model_class: str, config: hf.PreTrainedConfig, learning_rate: float = LEARNING_RATE) -> None:
        L.LightningModule.__init__(self)
        self.model_class, self.config, self.learning_rate = model_class, config, learning_rate
        self.net = None

    def configure_model(self) -> None:
        """Build the model once."""
        if self.net is None:
            self.net = getattr(hf, self.model_class)(self.config)


def tokens(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A text for a causal language model."""
    ids = token_ids(generator)
    return {"input_ids": ids, "labels": ids}


def masked_tokens(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A text for a masked language model; every token has a label."""
    return {
        "input_ids": token_ids(generator),
        "attention_mask": torch.ones(SEQUENCE, dtype=torch.long),
        "labels": token_ids(generator),
    }


def pair_of_texts(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two texts of different lengths."""
    return {"input_ids": token_ids(generator), "labels": token_ids(generator, SEQUENCE - 4)}


def image(generator: torch.Generator, size: int = 16) -> dict[str, torch.Tensor]:
    """An image and its class."""
    return {"pixel_values": torch.randn(3, size, size, generator=generator), "labels": class_id(generator)}


def audio(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A spectrogram and its text."""
    return {"input_features": torch.randn(8, 2 * SEQUENCE, generator=generator), "labels": token_ids(generator, 12)}


Table = dict[str, tuple[str, str, dict[str, Any]]]
"""name: (model class, config class, config arguments)"""

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Token ids within the tiny vocabulary."""
SCALE = {"initializer_range": 0.1, "init_std": 0.1}
"""About 1 / sqrt(width): with the usual 0.02 attention over so few dims is uniform and its weights have no gradient."""
WIDTHS = (
    {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4} | SPECIAL | SCALE
)
DECODER = WIDTHS | {"intermediate_size": 128, "max_position_embeddings": 64}
GROUPED = DECODER | {"num_key_value_heads": 2}
"""Two query heads to each key-value head."""
ENCODER = DECODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQ2SEQ = (
    {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "dropout": 0.0,
        "decoder_start_token_id": 2,
    }
    | SPECIAL
    | SCALE
)
GPT = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 64, "n_layer": 4, "n_head": 4} | SPECIAL | SCALE
NO_GPT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MIXTURE = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}


def _build(
    module_class: type[HFModule], model_class: str, config_class: str, config: dict[str, Any], learning_rate: float
) -> HFModule:
    return module_class(model_class, getattr(hf, config_class)(**config), learning_rate)


def hf_cases(
    table: Table,
    sample: Callable[[torch.Generator], Any],
    *,
    module_class: type[HFModule] = HFModule,
    suffix: str = "",
    slow: bool = False,
    microbatches: int | Literal["auto"] = 4,
    learning_rate: float = LEARNING_RATE,
) -> list[Case]:
    """Make cases from a table of name: (model class, config class, config arguments)."""
    return [
        Case(
            name=name + suffix,
            build=partial(_build, module_class, *entry, learning_rate),
            sample=sample,
            slow=slow,
            microbatches=microbatches,
        )
        for name, entry in table.items()
    ]
