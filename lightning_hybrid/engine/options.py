"""Checks that all ranks step an optimizer with the same options.

A hook may set a learning rate from what it has seen of its replica's samples. The replicas would then make different
updates from the same gradients, and their weights would drift apart.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_hybrid._lightning_private import users_callbacks
from lightning_hybrid._torch_private import location_of
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.launch.mentions import functions_that_mention
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

_OPTIONS = ("lr", "weight_decay", "momentum", "betas", "eps")
"""Options that users and schedulers change. Optimizers keep counters and estimates of a rank's weights in others."""
_PRIME = 1_000_003
"""Codes are below it, so that the sum of their squares over up to 9,000 ranks is exact in float64."""
_CLOSE = 1e-6
"""Relative difference of equal options that ranks have computed in another order. Empirical."""


def option_numbers(optimizer: Optimizer) -> tuple[float, float]:
    """Returns two numbers whose sums over all ranks show whether all have the same options of `optimizer`."""
    code = float(zlib.crc32(repr(_options(optimizer)).encode()) % _PRIME)
    return code, code * code


def check_options(sums: Sequence[float], optimizer: Optimizer, trainer: pl.Trainer, layout: Layout) -> None:
    """Refuses an update with different options.

    Args:
        sums: The sums of `option_numbers` over all ranks.
        optimizer: The optimizer.
        trainer: The trainer.
        layout: The layout.

    Raises:
        PartitionError: On all ranks, if they differ.
    """
    total, squares = sums
    if squares * dist.get_world_size() == total * total:  # only if all codes are equal (Cauchy-Schwarz)
        return
    gathered = gather_objects(_options(optimizer))
    for rank, options in enumerate(gathered):
        for group, (first, own) in enumerate(zip(gathered[0], options, strict=False)):
            name = next((n for n in first if n in own and not _close(first[n], own[n])), None)
            if name is not None:
                raise PartitionError(
                    f"`layout='{layout}'`: `{name}` of group {group} of {type(optimizer).__name__} is {first[name]} on "
                    f"rank 0, and {own[name]} on rank {rank}: the replicas would train different weights."
                    f"{_where(trainer)} Compute it from values that all replicas have: those of "
                    "`self.trainer.callback_metrics`, or the result of `self.all_gather(...)`."
                )


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the options of each group that are numbers; of those on another device only that they are there."""
    return [{n: _number(group[n]) for n in _OPTIONS if n in group} for group in optimizer.param_groups]


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" and value.numel() == 1 else None
    if isinstance(value, tuple | list):
        return tuple(_number(v) for v in value)
    return float(value) if isinstance(value, int | float) else None


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_close, one, other))
    if not isinstance(one, float) or not isinstance(other, float):
        return True
    return math.isclose(one, other, rel_tol=_CLOSE) or (math.isnan(one) and math.isnan(other))


def _where(trainer: pl.Trainer) -> str:
    """Returns a sentence with the places in the user's code that may have changed options."""
    owners = [trainer.lightning_module, *users_callbacks(trainer)]
    found = functions_that_mention(owners, "param_groups", "lr_schedulers")
    places = list(dict.fromkeys(f"`{f.__name__}` ({location_of(f)})" for f in found))
    return f" Options are changed in {', '.join(places[:3])}." if places else " A hook or a scheduler has changed it."
