"""Hides messages of Lightning that every rank repeats, or that users can do nothing about."""

from __future__ import annotations

import logging
import re

_ON_EVERY_RANK = (
    *("fabric.utilities.seed", "pytorch.accelerators.cuda"),
    *("pytorch.trainer.connectors.checkpoint_connector", "pytorch.trainer.connectors.signal_connector"),
    *("pytorch.callbacks.early_stopping", "pytorch.callbacks.finetuning", "pytorch.callbacks.pruning"),
    *("pytorch.tuner.batch_size_scaling", "pytorch.tuner.lr_finder"),
)
"""Modules of Lightning that log on every rank."""
_ON_RANK_ZERO = ("fabric.utilities.rank_zero", "pytorch.utilities.rank_zero")
"""Modules of Lightning by which others log on rank 0."""
_USELESS = re.compile(r"💡 Tip:|TPU available: False|GPU available: False, used: False|`weights_only` was not set")
"""Beginnings of advertisements, of lines about devices that are not there, and of a default."""

_OF_OTHER_RANK = re.compile(r"\[rank: [1-9]")


def hide_messages() -> None:
    """Adds filters to the loggers of Lightning, under both of its names, without importing it."""
    for module in _ON_EVERY_RANK + _ON_RANK_ZERO:
        package, _, rest = module.partition(".")
        other = {"fabric": "lightning_fabric", "pytorch": "pytorch_lightning"}[package]
        for name in (f"lightning.{module}", f"{other}.{rest}"):
            logger = logging.getLogger(name)
            logger.addFilter(_is_useful)
            if module in _ON_EVERY_RANK:
                logger.addFilter(_is_of_rank_zero)


def _is_useful(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not _USELESS.match(record.getMessage())


def _is_of_rank_zero(record: logging.LogRecord) -> bool:
    from lightning_utilities.core.rank_zero import rank_zero_only

    if record.levelno > logging.INFO:
        return True
    return not getattr(rank_zero_only, "rank", 0) and not _OF_OTHER_RANK.match(record.getMessage())
