"""The loss of samples whose tokens have labels.

Dims in the suffixes of tensor names: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of a token without loss."""


def labeled_loss(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean cross entropy in nats per labeled token, and the number of these tokens."""
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED)
    return loss, (labels_BT != IGNORED).sum()
