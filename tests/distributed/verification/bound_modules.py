"""Modules with bounds that act on a batch as a whole, and that only later batches reach."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- as users import it

from tests.distributed.ghosts.modules import WIDTH, Plain


class Late(Plain):
    """Targets grow from the third batch on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step({**batch, "y": batch["y"] * (4 if self.global_step > 1 else 1)}, batch_idx)


class Clamped(Late):
    """The loss of the batch is bounded."""

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        return F.mse_loss(out, batch["y"]).clamp(max=14.0)


class Trimmed(Late):
    """Samples with a large loss are left out of the mean."""

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        each = F.mse_loss(out, batch["y"], reduction="none").mean(1)
        kept = (each < 9).float()
        return (each * kept).sum() / kept.sum().clamp(min=1)


class Scaled(Plain):
    """Features are scaled by the norm over the batch, if it is large."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = x * (40 if self.global_step > 1 else 1)
        return self.head(x * (60 / (x.detach().norm() + 1e-6)).clamp(max=1)) * 0.1


class Skipped(Late):
    """The number that the loss has decides how it counts."""

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        loss = F.mse_loss(out, batch["y"])
        return loss * 0.1 if loss.item() > 12 else loss


class Words(Plain):
    """The loss over the tokens of a batch is bounded; the batch has no numbers but positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(self.embedding(batch["label"])) * (30 if self.global_step > 1 else 1)
        loss = F.cross_entropy(logits, batch["length"]).clamp(max=8.0)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss


class Elementwise(Late):
    """Bounds on single values leave the loss a mean over samples."""

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        return F.huber_loss(out.clamp(-3, 3), batch["y"])
